"""The plan of a big dataset: joining two feature sets of millions of samples, and going on in the middle of an epoch.

    python -m benchmarks.build_plan [--samples N] [--texts K] [--folder DIR] [--json FILE]

Entries of an image set in 40 buckets (a bell curve of sides, the rarest with a few hundred samples) and of K text sets
in an order of their own are made up in a temporary folder: 64 and 40 bytes for each sample, read from a warm page
cache. One sample in a hundred has no partner. Each figure comes from a process that does nothing else:

    build         reads and checks the entries (SHA-256 and a check for each record), joins them, writes the plan file
    open          checks every byte of the plan file and maps it
    first batch   from nothing but the number of a batch in the middle of a later epoch to its samples' records' numbers
    epoch         of each further epoch: everything that is computed once for it, without opening blocks
    batch         any further batch, opening of blocks included

Memory is the process's peak, the interpreter and numpy included. Ends with 1 where a limit is broken.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixart_data.entries import ENTRIES, IMAGE_ENTRY, TEXT_ENTRY, checks
from pixart_model.draws import draws, stream
from pixart_model.joins import EntriesFile
from pixart_model.orders import Order
from pixart_model.plan import build
from pixart_model.quality import shuffle_quality
from pixart_model.roster import open_plan

_BUCKETS = 40
_BATCH_SIZE = 64
_CHUNK_ROWS = 1 << 16
_SHARD_ROWS = 2_000
_STRIDE = 6_700_417  # a prime: text i belongs to image i * stride, so that neighbours there are far apart here
_MEASURED_BATCHES = 20_000


@dataclass(frozen=True)
class Figure:
    """A result, and the limit it must not pass, if there is one."""

    name: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def broken(self) -> bool:
        """Whether the limit is passed."""
        return self.limit is not None and self.value > self.limit


def bucket_sizes(samples: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the samples of each bucket, as widths and heights of photographs scatter."""
    weights = np.exp(-(((np.arange(_BUCKETS) - _BUCKETS / 2) / 6) ** 2)) + 1e-5
    sizes: np.ndarray[Any, np.dtype[np.int64]] = (weights / weights.sum() * samples).astype(np.int64)
    sizes[_BUCKETS // 2] += samples - sizes.sum()
    return sizes


def write_entries(folder: Path, samples: int, texts: int) -> tuple[EntriesFile, list[EntriesFile]]:
    """Make up the entries of an image set and of text sets."""
    keys, ends = stream(0), np.cumsum(bucket_sizes(samples))

    def write(name: str, dtype: np.dtype[np.void], shift: int) -> EntriesFile:
        path, digest = folder / name / ENTRIES, hashlib.sha256()
        path.parent.mkdir()
        with path.open("wb") as file:
            for start in range(0, samples, _CHUNK_ROWS):
                numbers = np.arange(start, min(start + _CHUNK_ROWS, samples))
                records = np.zeros(len(numbers), dtype)
                named = numbers if dtype is IMAGE_ENTRY else numbers * _STRIDE % samples + shift
                records["key"], records["row"] = draws(keys, named), numbers
                records["shard"], records["offset"] = numbers // _SHARD_ROWS, numbers % _SHARD_ROWS * 16_896
                if dtype is IMAGE_ENTRY:
                    records["bucket"] = np.searchsorted(ends, numbers, side="right")
                records["check"] = checks(records)
                digest.update(records.data)
                file.write(records.data)
        return EntriesFile(path, digest.hexdigest())

    images = write("images", IMAGE_ENTRY, 0)
    return images, [write(f"text{i}", TEXT_ENTRY, (i + 1) * samples // 100) for i in range(texts)]


def measure_build(job: dict[str, Any]) -> list[Figure]:
    """Build a plan."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    texts = [EntriesFile(Path(path), sha256) for path, sha256 in job["texts"]]
    path, sha256 = job["images"]
    counts = build(EntriesFile(Path(path), sha256), texts, _BUCKETS, Path(job["plan"]))
    return [
        Figure("build", time.perf_counter() - start_s, "s", 20.0),
        Figure("build, CPU", time.process_time() - start_cpu_s, "s"),
        Figure("build, peak memory", _peak_mb(), "MB", 500.0),
        Figure("plan file", Path(job["plan"]).stat().st_size / 1e6, "MB"),
        Figure("samples", counts.samples / 1e6, "million"),
    ]


def measure_resume(job: dict[str, Any]) -> list[Figure]:
    """Open a plan and go on in the middle of an epoch."""
    imported_mb = _peak_mb()
    start_s = time.perf_counter()
    joined = open_plan(Path(job["plan"]))
    opened_s = time.perf_counter() - start_s
    order = Order(joined.bucket_counts, _BATCH_SIZE, seed=1)
    number = int(17.4 * len(joined)) // _BATCH_SIZE
    start_s = time.perf_counter()
    samples = order.batch(number).samples
    _ = joined.images[samples], [texts[samples] for texts in joined.texts]
    first_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    order.locate(order.first_batch(18))
    order._turn(18, 0)
    epoch_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    for further in range(number + 1, number + 1 + _MEASURED_BATCHES):
        order.batch(further)
    each_s = (time.perf_counter() - start_s) / _MEASURED_BATCHES
    return [
        Figure("open", opened_s, "s", 1.0),
        Figure("first batch after a resume", first_s * 1e3, "ms", 1000.0),
        Figure("epoch", epoch_s * 1e3, "ms", 1000.0),
        Figure("batch, mean", each_s * 1e6, "us"),
        Figure("opened, peak memory", _peak_mb(), "MB"),
        Figure("of which interpreter and numpy", imported_mb, "MB"),
    ]


def _peak_mb() -> float:
    """Return the most that this process has held; ru_maxrss would begin with what its parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on a Mac


def _in_process(what: str, job: dict[str, Any]) -> list[Figure]:
    command = [sys.executable, "-m", "benchmarks.build_plan", "--turn", what, json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [Figure(**figure) for figure in json.loads(done.stdout)]


def table(figures: list[Figure]) -> str:
    """Return the figures beside their limits."""
    lines = [f"{'':34}{'':>10}     limit"]
    for figure in figures:
        limit = "" if figure.limit is None else f"{figure.limit:g} {figure.unit}"
        verdict = "  BROKEN" if figure.broken else ""
        lines.append(f"{figure.name:34}{figure.value:10.2f} {figure.unit:8}{limit}{verdict}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.build_plan", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--samples", type=int, default=25_000_000, help="in each set (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=1, help="text sets (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; 110 bytes for each sample")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        what, job = options.turn[0], json.loads(options.turn[1])
        figures = {"build": measure_build, "resume": measure_resume}[what](job)
        sys.stdout.write(json.dumps([vars(figure) for figure in figures]) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        sys.stderr.write(f"making up entries of {options.samples:,} samples\n")
        images, texts = write_entries(Path(name), options.samples, options.texts)
        job = {
            "images": [str(images.path), images.sha256],
            "texts": [[str(text.path), text.sha256] for text in texts],
            "plan": str(Path(name) / "joined.plan"),
        }
        figures = _in_process("build", job) + _in_process("resume", job)
        joined = open_plan(Path(job["plan"]))
        shards = np.memmap(images.path, IMAGE_ENTRY, "r")["shard"]
        quality = shuffle_quality(
            Order(joined.bucket_counts, _BATCH_SIZE, seed=1), 200, lambda samples: shards[joined.images[samples]]
        )
    facts = f"{options.samples:,} samples, {options.texts} text sets, {os.cpu_count()} cores, numpy {np.__version__}, "
    sys.stdout.write(f"{table(figures)}\n{quality}\n{facts}Python {platform.python_version()}\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([vars(figure) for figure in figures], indent=1) + "\n")
    if any(figure.broken for figure in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
