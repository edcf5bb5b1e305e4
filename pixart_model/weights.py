"""Weights from wherever they are, under the reference's names: checkpoints of ours, `.pth`, `.pt`, diffusers folders.

Nothing that a file says is run: safetensors, or torch's `weights_only` unpickler, which builds tensors, numbers, texts
and containers. Tensors stay in the file until they are used (mapped memory), where its format allows that.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart_data.errors import ConfigError, DataError
from pixart_data.leases import FOLDER as LEASES
from pixart_model import checkpoint, hub
from pixart_model.conversion import is_diffusers, native, require_weights
from pixart_model.networks import build
from pixart_model.shapes import UNSEEN, config_of, grid_of
from pixart_model.sizes import Model

POSITIONS, NULL_TABLE = "pos_embed", "y_embedder.y_embedding"
CONFIG_KEY = "pixart_model"
"""The key under which the `model` section stands: in a safetensors file's metadata, as JSON, or beside the weights in a
`.pth`, as a dictionary."""
FEATURES_KEY, AVERAGE_KEY = "pixart_features", "pixart_is_ema"
"""In such metadata, `Weights.features` and `Weights.is_ema`, as JSON."""
NULL_CAPTION = "null_caption"
"""The tensor of a safetensors file that is `Weights.null_caption`."""
FILES = ("model.safetensors", "model.pth", "model.pt")
"""What `pixart convert` calls the one file that it writes into a folder."""
DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS, TRANSFORMER = (
    "config.json", "diffusion_pytorch_model.safetensors", "transformer",
)  # fmt: skip

_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")  # the latter in the folders first released
_KINDS = (
    "a checkpoint or a run of `pixart train`, a .pth of PixArt, a .pt of DiT, a .safetensors file, or a folder or hub "
    "id of diffusers' PixArtTransformer2DModel"
)
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt")
_LFS = b"version https://git-lfs"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FOREIGN = "no file of torch or safetensors"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Weights:
    """What a source holds.

    Attributes:
        tensors: Complete, under the names of `networks.build(config)`, on the CPU, in the source's dtype.
        config: The model that they are of.
        null_table: The reference's learned null caption `y_embedding`, (L, caption_width), where the source has one.
        features: `Meta.features` of a checkpoint of ours, or a .safetensors file made of one: which encoders it was
            trained on.
        null_caption: Likewise: bf16 (n, caption_width), the features of the empty caption.
        where: Names the source, for messages.
        is_ema: Whether the tensors are the moving average of the weights.
        assumed: Keys of `config` that the source does not tell, nor did the caller: they have their defaults.
    """

    tensors: dict[str, Tensor]
    config: Model
    null_table: Tensor | None
    features: dict[str, Any] | None
    null_caption: Tensor | None
    where: str
    is_ema: bool = False
    assumed: tuple[str, ...] = ()


def resolve(source: str | Path) -> str:
    """Return what `read` has to be given to read now and later the same: of a run, the path of its last checkpoint.

    A run that is still at work gets new checkpoints, and loses old ones. All other sources stay what they are.
    """
    path = Path(source)
    if (path / checkpoint.META).is_file():
        return str(source)
    return str(checkpoint.latest(path) or source)


def read(source: str | Path, use_ema: bool = True, given: Mapping[str, Any] = _NOTHING) -> Weights:
    """Read weights, complete and each of its shape.

    Args:
        source: A path, or a hub id.
        use_ema: Take the moving average, where there is one.
        given: Keys of `model` among `shapes.UNSEEN`, for what the source does not tell: `heads`, `base_size` ...

    Raises:
        ConfigError: If there is nothing of the kind at the source, or it does not tell what `given` lacks too.
        DataError: If the source is damaged, holds more than data, or a weight is missing, surplus, misshapen or no
            floating-point number; the message names it.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, use_ema, given)
    if path.is_file():
        return _read_file(path, use_ema, given)
    if _may_be_hub_id(str(source)):
        return _read_diffusers(f"{source} on the hub", hub.opened(str(source)), given)
    raise ConfigError(f"{source}: expected {_KINDS}, found nothing there; check the path")


def _may_be_hub_id(source: str) -> bool:
    """Whether to ask the hub: not for a path that is mistyped below a folder that exists (`.` and `..` do)."""
    first = Path(source.partition("/")[0])
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix not in _SUFFIXES and not first.exists()


def _read_folder(path: Path, use_ema: bool, given: Mapping[str, Any]) -> Weights:
    if checkpoint.latest(path) is not None or (path / checkpoint.META).is_file():
        return _read_checkpoint(checkpoint.find(path), use_ema)
    folder = path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path
    if (folder / DIFFUSERS_CONFIG).is_file():
        return _read_diffusers(str(folder), lambda name: _if_file(folder / name), given)
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is not None and not (path / checkpoint.EMA).exists():  # a checkpoint that lost its meta.json has both
        return _read_file(file, use_ema, given)
    if (path / LEASES).is_dir():
        raise ConfigError(
            f"{path}: expected a run with a checkpoint, found one that has saved none yet; wait for its first, or run "
            "`pixart train` on it to go on"
        )
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:3]) or "an empty folder"
    raise ConfigError(f"{path}: expected {_KINDS}, found {found}; give one of them, a file by its own name")


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


# Checkpoints of ours


def _read_checkpoint(path: Path, use_ema: bool) -> Weights:
    meta = checkpoint.read_meta(path)
    null = checkpoint.load_null_caption(path)
    tensors = checkpoint.load_weights(path, use_ema)
    table = null.features.float() if null is not None and null.follows_caption else None
    empty = null.features if null is not None and not null.follows_caption else None
    return Weights(tensors, meta.model_config, table, meta.features, empty, str(path), is_ema=use_ema)


# Files


def _read_file(path: Path, use_ema: bool, given: Mapping[str, Any]) -> Weights:
    if path.suffix == ".safetensors":
        tensors, metadata = _load_safetensors(path)
        if is_diffusers(tensors):
            beside = _if_file(path.with_name(DIFFUSERS_CONFIG))
            told = _diffusers_told(beside) if beside else {}
            return _complete(str(path), native(str(path), tensors), {**given, **told})
        return _read_own(path, tensors, metadata, given)
    content = _load_pickle(path)
    tensors, null_table, is_ema = _choose(path, content, use_ema)
    return _complete(str(path), tensors, {**given, **_told_beside(path, content)}, null_table, is_ema)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _load_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote; DiT's training script stored its command line beside the weights.

    An `argparse.Namespace` does nothing when it is built or filled: allowing it lets no code in.
    """
    is_zip = _require_intact(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickles of other protocols, which are refused or read all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found is None:
            raise _damaged(path, _FOREIGN) from error
        raise DataError(
            f"{path}: expected tensors, numbers and text, found {found[1]}, which loading would run or build; nothing "
            "was loaded: ask whoever made it for the weights alone, as .safetensors"
        ) from error
    except (RuntimeError, OSError) as error:
        raise _damaged(path, error) from error
    except (ValueError, EOFError, LookupError, TypeError, AttributeError) as error:  # what unpickling any bytes ends in
        raise _damaged(path, error if is_zip else _FOREIGN) from error


def _require_intact(path: Path) -> bool:
    """Return whether a file is a zip archive, as torch writes, and if it is, check its sums: torch does not.

    It is read piece by piece, so this takes no memory.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            has_sums = any(member.CRC for member in archive.infolist())  # torch.save can leave them out, as zeros
            damaged = archive.testzip() if has_sums else None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error
    if damaged is not None:
        raise DataError(
            f"{path}: expected the bytes that were written, found others in its member {damaged} (its CRC-32 differs); "
            "copy or download it again"
        )
    return True


def _damaged(path: Path, error: Exception | str) -> DataError:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return DataError(f"{path}: expected weights, found a pointer of Git LFS; fetch it with `git lfs pull`")
    return DataError(f"{path}: cannot be read as weights ({hub.sentence(error)}); copy or download it again")


def _choose(path: Path, content: Any, use_ema: bool) -> tuple[dict[str, Tensor], Tensor | None, bool]:
    """Return the weights that a file is asked for, its null table, and whether they are a moving average.

    The null table is never the average's: the reference averages parameters, and this is none, so that what it saved
    with the average is the random table that the run began with.
    """
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a dictionary of weights, found {type(content).__name__}; give another file")
    plain, average = next(
        ((a, b) for a, b in (("state_dict", "state_dict_ema"), ("model", "ema")) if a in content or b in content),
        (None, None),
    )
    is_ema = average is not None and bool(content.get(average)) and (use_ema or plain not in content)
    key = average if is_ema else plain
    chosen = _tensors(path, content if key is None else content[key])
    null_table = chosen.pop(NULL_TABLE, None)
    if is_ema and isinstance(content.get(plain), Mapping):
        null_table = content[plain].get(NULL_TABLE, null_table)
    return chosen, null_table, is_ema


def _told_beside(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What `pixart convert` wrote beside the weights of what they do not tell."""
    config = content.get(CONFIG_KEY, {})
    if not isinstance(config, Mapping):
        raise DataError(f"{path}: {CONFIG_KEY}: expected a section, found {type(config).__name__}; give another file")
    return {key: config[key] for key in UNSEEN if config.get(key) is not None}


def _tensors(path: Path, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"{path}: expected weights by name, found {type(found).__name__}; give another file")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{path}: {name}: expected a tensor, found {type(tensor).__name__}; give another file")
    return {str(name): tensor.detach() for name, tensor in found.items()}


def _read_own(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], given: Mapping[str, Any]) -> Weights:
    """Read weights under the reference's names, with what `pixart convert` writes beside them, if it did."""
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
        told = {key: config[key] for key in UNSEEN if config.get(key) is not None}
        features = json.loads(metadata.get(FEATURES_KEY, "null"))
        is_ema = json.loads(metadata.get(AVERAGE_KEY, "false")) is True
        if features is not None and not isinstance(features, dict):
            raise ValueError(f"{FEATURES_KEY}: expected an object")
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    null_caption = tensors.pop(NULL_CAPTION, None)
    weights = _complete(str(path), tensors, {**given, **told}, is_ema=is_ema)
    if null_caption is not None:
        _require_captions(str(path), NULL_CAPTION, null_caption, weights.config.caption_width)
    return dataclasses.replace(weights, features=features, null_caption=null_caption)


# diffusers


def _read_diffusers(where: str, get: Callable[[str], Path | None], given: Mapping[str, Any]) -> Weights:
    """Read a transformer's files; `get` returns the path of one by its name, or None if there is none."""
    config = get(DIFFUSERS_CONFIG)
    told = _diffusers_told(config) if config else {}
    tensors: dict[str, Tensor] = {}
    for path in _diffusers_files(where, get):
        tensors |= _load_safetensors(path)[0]
    return _complete(where, native(where, tensors), {**given, **told})


def _diffusers_files(where: str, get: Callable[[str], Path | None]) -> list[Path]:
    whole = get(DIFFUSERS_WEIGHTS)
    if whole is not None:
        return [whole]
    index = get(f"{DIFFUSERS_WEIGHTS}.index.json")
    if index is None:
        raise ConfigError(f"{where}: expected {DIFFUSERS_WEIGHTS}, found none; save the model as safetensors")
    names = sorted(set(_json(index).get("weight_map", {}).values()))
    files = {name: get(name) for name in names if Path(name).name == name}
    lost = next((name for name in names if files.get(name) is None), None)
    if lost is not None or not names:
        raise DataError(f"{where}: {lost or 'weight_map'} is missing, which {index.name} names; copy the folder again")
    return [path for path in files.values() if path is not None]


def _diffusers_told(path: Path) -> dict[str, Any]:
    """What `config.json` tells of what weights do not."""
    config = _json(path)
    found = config.get("_class_name")
    if found not in _CLASSES:
        raise ConfigError(f"{path}: expected a {_CLASSES[0]}, found {found}; give the folder of the transformer")
    try:
        side, scale = int(config["sample_size"]), config.get("interpolation_scale")
        heads = int(config["num_attention_heads"])
        scale = max(side // 64, 1) if scale is None else scale  # as the class has it
        return {"heads": heads, "base_size": side, "interpolation_scale": float(scale)}
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a configuration ({error}); copy or download it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected an object, found {type(found).__name__}; copy or download it again")
    return found


# All


def _complete(
    where: str,
    tensors: dict[str, Tensor],
    given: Mapping[str, Any],
    null_table: Tensor | None = None,
    is_ema: bool = False,
) -> Weights:
    """Find out what model weights are of, and check them against it."""
    tensors = dict(tensors)
    positions, null_table = tensors.pop(POSITIONS, None), tensors.pop(NULL_TABLE, null_table)
    told = {key: value for key, value in given.items() if key in UNSEEN and value is not None}
    if positions is not None and not {"base_size", "interpolation_scale"} <= told.keys():
        patch = tensors["x_embedder.proj.weight"].shape[-1] if "x_embedder.proj.weight" in tensors else 1
        told = {**grid_of(where, positions, patch), **told}
    config = config_of(where, tensors, told)
    with torch.device("meta"):
        expected = build(config).state_dict()
    require_weights(where, expected, tensors)
    if null_table is not None:
        _require_captions(where, NULL_TABLE, null_table, config.caption_width)
    assumed = tuple(sorted({"base_size", "interpolation_scale"} - told.keys()))
    return Weights(tensors, config, null_table, None, None, where, is_ema, assumed)


def _require_captions(where: str, name: str, features: Tensor, width: int) -> None:
    if features.ndim != 2 or not len(features) or features.shape[1] != width:
        raise DataError(
            f"{where}: {name}: expected shape (L, {width}), found {tuple(features.shape)}; is it of another model "
            "configuration?"
        )
    if not features.is_floating_point():
        kind = str(features.dtype).removeprefix("torch.")
        raise DataError(f"{where}: {name}: expected floating-point numbers, found {kind}; give another file")
