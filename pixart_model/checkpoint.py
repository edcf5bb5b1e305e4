"""Checkpoints: complete, atomic, and enough to sample from without the dataset.

A checkpoint is a directory `step_00001000/` in the run's directory. It is written under a temporary name, flushed and
renamed, so one that can be seen is whole:

    model.safetensors         the weights, fp32, under the reference's names
    ema.safetensors           their moving average
    null_caption.safetensors  `t5`, bf16 (n, D): the features of the empty caption
    state.pt                  the optimizer and the place in the data; the noise of a step follows from seed and step
    config.toml               the job file with every default
    meta.json                 step, model, encoders of the features with their revisions, versions
"""

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_data.errors import ConfigError, DataError, JobError
from pixart_data.retries import storage
from pixart_data.storage import make_dir, sync_dir
from pixart_model.conversion import require_keys
from pixart_model.model import PixArt
from pixart_model.sizes import Model

META, MODEL, EMA, NULL_CAPTION, STATE, CONFIG = (
    "meta.json", "model.safetensors", "ema.safetensors", "null_caption.safetensors", "state.pt", "config.toml",
)  # fmt: skip
_FORMAT = "pixart-checkpoint"
_VERSION = 1
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"step_(\d{8,})")
_OS_ERROR = re.compile(r"os error (\d+)")
_DAMAGED = (SafetensorError, pickle.UnpicklingError)
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
        versions: Of the libraries that wrote it.
    """

    step: int
    model: dict[str, Any]
    features: dict[str, Any]
    resumes: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    format: str = _FORMAT
    version: int = _VERSION

    @property
    def model_config(self) -> Model:
        """The `model` section."""
        return Model.model_validate(self.model)


@dataclass(frozen=True)
class Snapshot:
    """Everything in a checkpoint.

    Attributes:
        meta: What it is.
        model: The weights by name.
        ema: Their moving average.
        null_caption: bf16 (n, D).
        training: `optimizer` and `position`: tensors, numbers, strings, lists and dicts only.
        job_toml: The job file.
    """

    meta: Meta
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    null_caption: Tensor
    training: dict[str, Any]
    job_toml: str


def save(run_dir: Path, snapshot: Snapshot, keep_last: int) -> Path:
    """Write a checkpoint, then delete all but the last `keep_last`; returns the checkpoint's directory.

    A checkpoint of the same step is left as it is.

    Raises:
        JobError: If the storage fails, in one line; nothing half-written can be mistaken for a checkpoint.
    """
    final = run_dir / f"step_{snapshot.meta.step:08d}"
    if not final.exists():
        make_dir(run_dir)
        with storage(run_dir):
            staged = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{final.name}-", dir=run_dir))
        try:
            _write(staged, snapshot)
            with storage(final):
                staged.chmod(0o755)
                os.rename(staged, final)
                sync_dir(run_dir)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    prune(run_dir, keep_last)
    return final


def load(path: Path) -> Snapshot:
    """Read a whole checkpoint onto the CPU.

    Raises:
        DataError: If a file is missing or damaged, or a weight is missing, surplus or of another shape.
    """
    meta = read_meta(path)
    weights, average = (load_weights(path, use_ema) for use_ema in (False, True))
    with _reading(path / STATE):
        training = torch.load(path / STATE, map_location="cpu", weights_only=True)
        job_toml = (path / CONFIG).read_text()
    return Snapshot(meta, weights, average, load_null_caption(path), training, job_toml)


def load_model(path: Path, use_ema: bool, device: torch.device, dtype: torch.dtype) -> PixArt:
    """Build the model of a checkpoint, for sampling: in evaluation mode, without gradients.

    Raises:
        DataError: As `load` does.
    """
    with torch.device("meta"):
        model = PixArt(read_meta(path).model_config)
    model.load_state_dict(load_weights(path, use_ema), strict=True, assign=True)
    return model.to(device, dtype).eval().requires_grad_(False)


def load_weights(path: Path, use_ema: bool) -> dict[str, Tensor]:
    """Return the weights of a checkpoint or their moving average, complete.

    Raises:
        DataError: If a weight is missing, surplus or of another shape, naming it.
    """
    file = path / (EMA if use_ema else MODEL)
    with _reading(file):
        weights: dict[str, Tensor] = load_file(file)
    with torch.device("meta"):
        expected = PixArt(read_meta(path).model_config).state_dict()
    require_keys(str(file), set(expected), set(weights))
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            found = f"{tuple(tensor.shape)}, found {tuple(weights[name].shape)}"
            raise DataError(f"{file}: {name}: expected shape {found}; is it of another model configuration?")
    return weights


def load_null_caption(path: Path) -> Tensor:
    """Return the features of the empty caption that a checkpoint carries, bf16 (n, D).

    Raises:
        DataError: If the file is missing or damaged.
    """
    with _reading(path / NULL_CAPTION):
        tensor: Tensor = load_file(path / NULL_CAPTION)["t5"]
    return tensor


def read_meta(path: Path) -> Meta:
    """Return what a checkpoint is.

    Raises:
        DataError: If that cannot be read, or it is of another format or version.
    """
    with _reading(path / META):
        fields = json.loads((path / META).read_text())
        if (fields.get("format"), fields.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"expected {_FORMAT} version {_VERSION}, found {fields.get('format')}")
        meta = Meta(**fields)
        meta.model_config  # noqa: B018 - complains
    return meta


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


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete a run's checkpoints but the last `keep_last`, and what killed runs left behind."""
    with storage(run_dir):
        for path in _checkpoints(run_dir)[:-keep_last]:
            os.rename(path, path.with_name(f"{_TEMPORARY}{path.name}-old"))
            _log.info("deleted %s", path)
        for path in run_dir.glob(f"{_TEMPORARY}step_*"):
            shutil.rmtree(path)


def _checkpoints(run_dir: Path) -> list[Path]:
    steps = {path: _NAME.fullmatch(path.name) for path in run_dir.glob("step_*")}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.name[5:]))


def _write(staged: Path, snapshot: Snapshot) -> None:
    tensors = {MODEL: snapshot.model, EMA: snapshot.ema, NULL_CAPTION: {"t5": snapshot.null_caption}}
    for name, weights in tensors.items():
        with _writing(staged / name):
            save_file({key: tensor.detach().contiguous() for key, tensor in weights.items()}, staged / name)
    with _writing(staged / STATE), (staged / STATE).open("wb") as file:
        torch.save(snapshot.training, file)
    texts = {CONFIG: snapshot.job_toml, META: json.dumps(asdict(snapshot.meta), indent=1)}
    for name, text in texts.items():
        with _writing(staged / name):
            (staged / name).write_text(text)
    with storage(staged):
        for path in staged.iterdir():
            path.chmod(0o644)
            sync_dir(path)
        sync_dir(staged)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Like `storage`, also where safetensors or torch hide the operating system's error in one of their own."""
    with storage(path):
        try:
            yield
        except SafetensorError as error:
            found = _OS_ERROR.search(str(error))
            if not found:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise JobError(f"{path}: cannot write: {error}; check the storage, then run again") from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: missing from the checkpoint; delete its folder to use the one before") from None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, *_DAMAGED) as error:
        what = str(error)[:200]
        raise DataError(f"{path}: damaged ({what}); delete the checkpoint's folder to use the one before") from error
