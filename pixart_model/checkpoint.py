"""Checkpoints: complete, atomic, and enough to sample from without the dataset.

A checkpoint is a directory `step_00001000/` in the run's directory. It is written under a temporary name, flushed and
renamed when all processes have written their part, so one that can be seen is whole:

    model.safetensors         the weights, fp32, under the reference's names
    ema.safetensors           their moving average
    null_caption.safetensors  `t5`, bf16 (n, D): what replaces a dropped caption; not with `condition = "class"`
    optimizer/*.safetensors   its state by names of weights, a file of each process (torch.distributed.checkpoint)
    config.toml               the job file with every default
    meta.json                 step, place in the data, model, features and their revisions, versions; size and sha256
                              of every other file

There is no state of random generators: all randomness of a step follows from the seed and the number of the batch.
Nothing here is a pickle. `savers` writes checkpoints, `states` brings them back into training; here are those who read
them.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart_data.commits import PublishedFile, file_sha256
from pixart_data.config import digest
from pixart_data.errors import ConfigError, DataError
from pixart_model.conversion import require_keys
from pixart_model.networks import Network, build
from pixart_model.nulls import NullCaption
from pixart_model.sizes import Model

META, MODEL, EMA, NULL_CAPTION, OPTIMIZER, CONFIG = (
    "meta.json", "model.safetensors", "ema.safetensors", "null_caption.safetensors", "optimizer", "config.toml",
)  # fmt: skip
TEMPORARY = ".tmp-"
_FORMAT = "pixart-checkpoint"
_VERSION = 2
_NAME = re.compile(r"step_(\d{8,})")
_ADVICE = "delete the checkpoint's folder to use the one before"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is.

    Attributes:
        step: Optimizer steps done.
        model: The `model` section.
        features: What `Dataset.facts` says of the training data: `image` and `text`, each with `model` (id, revision,
            scaling_factor ...), `policy` and `index_sha256`; `resolution_px`; `counts`.
        resumes: What a job must agree on to continue from here.
        position: `seed`, `step` and `batch`, the number of the next batch: data and randomness go on from there.
        world: What it was trained on, for the reader's information: such as `size`, `parallel`, `dtype`.
        null_caption: How long the null caption is: `own_length`, `caption_length` (the reference's table, cut at the
            length of the caption that it replaces), or None with `condition = "class"`. `Saver` fills this in.
        versions: Of the libraries that wrote it.
        files: Of all other files of the checkpoint. `Saver` fills this in.
    """

    step: int
    model: dict[str, Any]
    features: dict[str, Any]
    resumes: dict[str, Any]
    position: dict[str, int] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)
    null_caption: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: tuple[PublishedFile, ...] = ()

    @property
    def model_config(self) -> Model:
        """The `model` section."""
        return Model.model_validate(self.model)

    def to_json(self) -> str:
        """Return the content of `meta.json`, which vouches for itself."""
        fields = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        return json.dumps({**fields, "sha256": digest(fields)}, indent=1)


def read_meta(path: Path) -> Meta:
    """Return what a checkpoint is.

    Raises:
        DataError: If that cannot be read, or it is of another format or version.
    """
    file = path / META
    with reading(file):
        fields = json.loads(file.read_text())
        _require_version(path, fields)
        sha256 = fields.pop("sha256")
        if sha256 != digest(fields):
            raise ValueError("its sha256 is another")
        del fields["format"], fields["version"]
        fields["files"] = tuple(PublishedFile(**entry) for entry in fields["files"])
        meta = Meta(**fields)
        meta.model_config  # noqa: B018 - complains
    return meta


def _require_version(path: Path, fields: Mapping[str, Any]) -> None:
    kind, version = fields.get("format"), fields.get("version")
    if kind != _FORMAT:
        raise ValueError(f"expected {_FORMAT}, found {kind}")
    if version == _VERSION:
        return
    advice = "it was written by a newer version of this toolkit: use that one"
    if isinstance(version, int) and version < _VERSION:
        advice = f'choose another run.output, and init.weights = "{path / EMA}" to begin with what it learnt'
    raise DataError(f"{path / META}: expected version {_VERSION} of checkpoints, found version {version}; {advice}")


def load_model(path: Path, use_ema: bool, device: torch.device, dtype: torch.dtype) -> Network:
    """Build the model of a checkpoint, for sampling: in evaluation mode, without gradients.

    Raises:
        DataError: As `load_weights` does.
    """
    with torch.device("meta"):
        model = build(read_meta(path).model_config)
    model.load_state_dict(load_weights(path, use_ema), strict=True, assign=True)
    return model.to(device, dtype).eval().requires_grad_(False)


def load_weights(path: Path, use_ema: bool) -> dict[str, Tensor]:
    """Return the weights of a checkpoint or their moving average, complete, on the CPU.

    Raises:
        DataError: If the file is missing or damaged, or a weight is missing, surplus or of another shape, naming it.
    """
    meta = read_meta(path)
    with torch.device("meta"):
        expected = build(meta.model_config).state_dict()
    name = EMA if use_ema else MODEL
    require_fit(path / name, expected)
    require_intact(path, meta, name)
    with reading(path / name), safe_open(path / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict


def load_null_caption(path: Path) -> NullCaption | None:
    """Return the null caption that a checkpoint carries; None of a model of classes, which has none.

    Raises:
        DataError: If the file is missing or damaged.
    """
    meta = read_meta(path)
    if meta.null_caption is None:
        return None
    require_intact(path, meta, NULL_CAPTION)
    with reading(path / NULL_CAPTION), safe_open(path / NULL_CAPTION, "pt") as file:
        return NullCaption(file.get_tensor("t5"), meta.null_caption == CONVENTIONS[True])


CONVENTIONS = {False: "own_length", True: "caption_length"}
"""Of null captions, by `NullCaption.follows_caption`."""


def require_fit(file: Path, expected: Mapping[str, Tensor]) -> None:
    """Check by the head of a file that it has the tensors which are expected.

    Raises:
        DataError: If it is missing or damaged, or a tensor is missing, surplus, of another shape or type, naming it.
    """
    with reading(file), safe_open(file, "pt") as source:
        require_keys(str(file), set(expected), set(source.keys()))
        for name, tensor in expected.items():
            shape = tuple(source.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                found = f"{tuple(tensor.shape)}, found {shape}"
                raise DataError(f"{file}: {name}: expected shape {found}; is it of another model configuration?")


def require_intact(path: Path, meta: Meta, name: str) -> None:
    """Check that a file of a checkpoint is what was written, by its size and sha256.

    Raises:
        DataError: If it is not.
    """
    wanted = next((file for file in meta.files if file.path == name), None)
    with reading(path / name):
        size_bytes = (path / name).stat().st_size
        if wanted is None:
            raise ValueError("meta.json does not know it")
        if size_bytes != wanted.size_bytes:
            raise ValueError(f"expected {wanted.size_bytes:,} bytes, found {size_bytes:,}")
        if file_sha256(path / name) != wanted.sha256:
            raise ValueError("its sha256 is another than when it was written")


def latest(run_dir: Path) -> Path | None:
    """Return the checkpoint of a run with the most steps; None if there is none."""
    found = _checkpoints(run_dir)
    return found[-1] if found else None


def find(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or else the last checkpoint of the run that it is.

    Raises:
        ConfigError: If it is neither.
    """
    found = path if (path / META).is_file() else latest(path)
    if found is None:
        raise ConfigError(f"{path}: expected a checkpoint or a run with one, found none; look for step_* folders")
    return found


def prune(run_dir: Path, keep_last: int) -> OSError | None:
    """Delete a run's checkpoints but the last `keep_last`, at least one, and what killed runs left behind.

    Nothing of the run may be being written. Storage may refuse, such as NFS while somebody reads a file that is to go:
    what can be deleted is, and the rest when this is called again.

    Returns:
        Why something is left, if so.
    """
    refused = None
    for path in _checkpoints(run_dir)[: -max(1, keep_last)]:
        try:
            os.rename(path, path.with_name(f"{TEMPORARY}{path.name}-old"))
            _log.info("deleted %s", path)
        except OSError as error:
            refused = error
    for path in run_dir.glob(f"{TEMPORARY}step_*"):
        refused = _delete(path) or refused
    return refused


def _delete(path: Path) -> OSError | None:
    try:
        shutil.rmtree(path, ignore_errors=True)  # all that can go, beyond the first that cannot
        if path.exists():
            shutil.rmtree(path)  # says why
    except OSError as error:
        return error
    return None


def _checkpoints(run_dir: Path) -> list[Path]:
    steps = {path: _NAME.fullmatch(path.name) for path in run_dir.glob("step_*")}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.name[5:]))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever fails in reading a part of a checkpoint into one line that names it.

    Raises:
        DataError: If it is missing or damaged.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: missing from the checkpoint; delete its folder to use the one before") from None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({str(error)[:200]}); {_ADVICE}") from error
