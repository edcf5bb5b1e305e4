"""`pixart convert`: weights of the transformer in the layout that another program reads."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jobs import assembly
from jobs.config import Convert
from jobs.layouts import write_pth, write_safetensors, write_transformer
from pixart_data.config import resolved_toml
from pixart_data.errors import ConfigError
from pixart_data.processes import is_alive, process_name
from pixart_data.retries import storage
from pixart_data.storage import TEMPORARY, make_dir, sync_dir
from pixart_model.conversion import require_expressible
from pixart_model.shapes import UNSEEN
from pixart_model.weights import Weights, read

log = logging.getLogger(__name__)

_JOB, _MARK = "job.toml", b"# pixart convert\n"
_NAME_CHARS = 60


def convert(job: Convert, dry_run: bool) -> None:
    """Write weights in another layout, or say what that would write.

    Raises:
        ConfigError: If there are no weights at the path, the layout cannot hold the model, or the output holds
            something else.
        DataError: If the weights are damaged or incomplete.
        JobError: If the storage fails.
    """
    output = Path(job.output)
    record = _MARK + resolved_toml(job).encode()
    _require_own(job.output, record)
    weights = read(job.path, job.use_ema, {key: getattr(job, key, None) for key in UNSEEN})
    _require_told(job, weights)
    if job.layout in ("diffusers", "pipeline"):
        require_expressible(weights.config)
    if job.layout == "pipeline":
        assembly.require(job, weights)
    what = _described(weights)
    if dry_run:
        print(f"convert: would write {what}, as {job.layout} -> {output}")
        return
    with _folder(output) as staged:
        _write(job, weights, staged)
        with storage(staged):
            (staged / _JOB).write_bytes(record)
    print(f"convert: {what}, as {job.layout} -> {output}")


def _described(weights: Weights) -> str:
    config, count = weights.config, sum(tensor.numel() for tensor in weights.tensors.values())
    kind = "DiT" if config.condition == "class" else "PixArt"
    kind += " with micro-conditioning" if config.micro_conditioning else ""
    average = " (moving average)" if weights.is_ema else ""
    return (
        f"{count:,} weights{average} of a {kind}, {config.depth} blocks of width {config.width}, from {weights.where}"
    )


def _require_own(output: str, record: bytes) -> None:
    """Refuse to take the place of anything but the same conversion.

    Raises:
        ConfigError: If the output is anything else, or no local folder.
    """
    path = Path(output)
    if "://" in output:
        raise ConfigError(f"output: expected a local folder, found {output}; convert to a disk, then copy it there")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output: expected a folder, found a file {path}; choose another with --out")
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    earlier = (path / _JOB).read_bytes() if _JOB in found else b""
    if earlier == record:
        log.info("output: %s holds this conversion already; it is made anew", path)
    elif found:
        what = "another conversion" if earlier.startswith(_MARK) else found[0]
        raise ConfigError(f"output: expected a new or empty folder, found {what} in {path}; choose another with --out")


def _require_told(job: Convert, weights: Weights) -> None:
    """Check that nothing about the model is guessed, and that what the job says of it is not denied by its source."""
    for key in sorted(UNSEEN):
        given, found = getattr(job, key, None), getattr(weights.config, key)
        if given is not None and given != found:
            raise ConfigError(f"{key}: expected {found}, which {weights.where} tells, found {given}; leave {key} out")
    if weights.assumed and job.layout != "safetensors":
        missing = " and ".join(weights.assumed)
        raise ConfigError(
            f"{weights.where}: expected positions (pos_embed) or a configuration beside the weights, found neither; "
            f"give {missing}, e.g. --set base_size=32 --set interpolation_scale=1.0 for PixArt-alpha at 256 px"
        )


def _write(job: Convert, weights: Weights, folder: Path) -> None:
    if job.layout == "pipeline":
        assembly.write(job, weights, folder)
    elif job.layout == "diffusers":
        write_transformer(weights, folder)
    elif job.layout == "safetensors":
        write_safetensors(weights, folder)
    else:
        known = {key: getattr(weights.config, key) for key in UNSEEN}
        source = job.path if weights.features is None else weights.where  # a run may have a newer checkpoint by now
        plain = read(source, use_ema=False, given=known) if weights.is_ema else weights
        write_pth(plain, weights if weights.is_ema and not plain.is_ema else None, folder)


# Folders that appear whole


@contextlib.contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `output` in the end, and is deleted if there is no end.

    Raises:
        JobError: If the storage fails.
    """
    prefix = f"{TEMPORARY}{output.name[-_NAME_CHARS:]}-"
    parent = make_dir(output.parent)
    staged = parent / f"{prefix}{process_name()}"
    with storage(parent):
        for left in parent.glob(f"{prefix}*"):
            if left == staged or not is_alive(left.name.removeprefix(prefix)):
                shutil.rmtree(left)
        staged.mkdir()
    try:
        yield staged
        with storage(output):
            _flush(staged)
            if output.is_dir():
                shutil.rmtree(output)
            os.rename(staged, output)
            sync_dir(parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors lets nobody else read
        sync_dir(path)
