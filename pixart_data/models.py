"""Loading pretrained models: where they run, in which precision, which exact weights they are, and clear failures."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_data.errors import ConfigError

if TYPE_CHECKING:
    import torch

_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class Placement:
    """Device and dtype a model is loaded to."""

    device: "torch.device"
    dtype: "torch.dtype"


def placement(device: str, dtype: str) -> Placement:
    """Resolve the `auto` values of a job file: the GPU if there is one; bf16 there and fp32 on a CPU.

    Raises:
        ConfigError: If CUDA is asked for and absent.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("device: expected a CUDA device, found none; use device = 'auto' or 'cpu'")
    kind = ("cuda" if has_cuda else "cpu") if device == "auto" else device
    by_name = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    default = torch.bfloat16 if kind == "cuda" else torch.float32
    return Placement(torch.device(kind), by_name.get(dtype, default))


def require_kind(setting: str, model: str, subfolder: str | None, kinds: str) -> None:
    """Check a local folder before any work is planned on it; of a hub id nothing is known yet.

    Args:
        kinds: A regular expression that must match the class or type that its `config.json` names.

    Raises:
        ConfigError: If the folder is missing, has no readable `config.json`, or holds another kind of model.
    """
    if not model.startswith("/"):
        return
    folder = _require_folder(setting, model, subfolder)
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = str(config.get("_class_name") or config.get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{setting}: {folder} holds no model: its config.json cannot be read: {error}") from error
    if not re.search(kinds, kind):
        raise ConfigError(f"{setting}: expected a model of kind {kinds}, found {kind} in {folder}; check the path")


@contextlib.contextmanager
def loading(setting: str, model: str) -> Iterator[None]:
    """Turn any failure of `from_pretrained` into one line that names the setting.

    Raises:
        ConfigError: If the model is missing, incomplete, of another kind, or needs a package that is not installed.
    """
    _require_folder(setting, model, None)
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{setting}: loading {model} needs a package: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"{setting}: {model} cannot be loaded: {_first_line(error)}; "
            "give a folder that from_pretrained loads, or a hub id that is reachable or in the local cache"
        ) from error


def quiet_loading() -> None:
    """Keep the libraries' loading bars off the terminal, from now on in this process."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


def require_weights(info: dict[str, Any]) -> None:
    """Check what `from_pretrained(..., output_loading_info=True)` tells beside the model.

    Raises:
        ValueError: If weights are missing: the libraries would only warn and draw them at random.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of the model's weights are not in it, e.g. {missing[0]}")


def identity(setting: str, model: str, revision: str | None, subfolder: str | None) -> str:
    """Return a string that changes when the weights do; part of every digest.

    For a folder: a digest of names, sizes and the first, middle and last MiB of its files, so that retrained weights
    of the same shape differ while 40 GB need not be read. For a hub id: the id and the revision asked for.

    Raises:
        ConfigError: If the model is a folder that does not exist.
    """
    if not model.startswith("/"):
        return f"{model}@{revision or 'main'}/{subfolder or ''}"
    root = _require_folder(setting, model, subfolder)
    sha256 = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        size_bytes = path.stat().st_size
        sha256.update(f"{path.relative_to(root)} {size_bytes}\n".encode())
        with path.open("rb") as file:
            for start in sorted({0, size_bytes // 2, max(0, size_bytes - _SAMPLED_BYTES)}):
                file.seek(start)
                sha256.update(file.read(_SAMPLED_BYTES))
    return f"folder:{sha256.hexdigest()}"


def provenance(config: Any, model: str, revision: str | None, subfolder: str | None) -> dict[str, Any]:
    """Return where a loaded model came from, for manifests: what loads it again, and what tells it from others.

    `config` is the loaded model's configuration, which knows the hub's commit where there is one.
    """
    commit = config.get("_commit_hash") if isinstance(config, dict) else getattr(config, "_commit_hash", None)
    return {
        "id": model,
        "subfolder": subfolder,
        "revision": commit or revision,
        "identity": identity(model, model, commit or revision, subfolder),
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, for provenance."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _require_folder(setting: str, model: str, subfolder: str | None) -> Path:
    folder = Path(model) / (subfolder or "")
    if model.startswith("/") and not folder.is_dir():
        raise ConfigError(f"{setting}: no such folder: {folder}; give a folder that from_pretrained loads, or a hub id")
    return folder


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return json.dumps(text)[1:-1][:300].replace('\\"', '"').rstrip(".")
