"""Readers in processes of their own that take turns: `python -m benchmarks.turns READER ROOT`, or `Worker` starts it.

A worker opens its reader, compares one pass in each order with what was written, and then waits for lines such as
`planned cold` on its input; to each it answers with a line of JSON. It ends with its input.
"""

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.batches import BATCH_SIZE, PLANNED, SEQUENTIAL, Expected, Reader, check, packed
from benchmarks.samples import Samples, load

WARM, COLD = "warm", "cold"
IMAGE_SET = "256px"
SAMPLES, SHARDS, MERGED, FILES, MDS = "samples", "shards", "merged", "files", "mds"  # folders of a root
OURS, PACKED, INT8, BARE = "ours", "ours-packed", "ours-int8", "pread"
WEBDATASET, MOSAIC, REFERENCE = "webdataset", "mosaic", "reference"
READERS = (OURS, PACKED, INT8, BARE, MOSAIC, WEBDATASET, REFERENCE)
CODECS = {OURS: "bf16", PACKED: "bf16-packed", INT8: "int8"}

_MIN_TURN_S = 1.0
_UNTIMED = 16  # batches: threads start, buffers are made, and as much is read ahead as will be at the end
_END_S = 10
_READ_BYTES = 8 << 20
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Turn:
    """What one turn took; CPU seconds are user and system time of all threads."""

    samples: int
    wall_s: float
    cpu_s: float
    from_disk_bytes: int


def text_set(codec: str) -> str:
    """Return the name of the text set that is stored by a codec."""
    return f"text-{codec}"


def folders(name: str) -> list[str]:
    """Return the folders that a reader reads, in the root."""
    peers = {WEBDATASET: MERGED, MOSAIC: MDS, REFERENCE: FILES}
    if name in peers:
        return [peers[name]]
    return [f"{SHARDS}/{IMAGE_SET}", f"{SHARDS}/{text_set(CODECS.get(name, CODECS[OURS]))}"]


def open_reader(name: str, root: Path, samples: Samples) -> tuple[Reader, Samples, Expected]:
    """Return a reader, the samples that it reads, and what it must give of each.

    The imports are here because MosaicML's environment is not that of the others.
    """
    if name == MOSAIC:
        from benchmarks.mosaic import Mosaic

        return Mosaic(root / MDS), samples, partial(packed, samples)
    from benchmarks import readers

    if name == REFERENCE:
        count = len(list((root / FILES).rglob("*.npy")))
        reader = readers.Files(root / FILES, [samples.key(i) for i in range(count)])
        return reader, samples.first(count), partial(readers.reference, samples)
    if name == WEBDATASET:
        return readers.WebDataset(root / MERGED), samples, partial(packed, samples)
    if name == BARE:
        return readers.Bare(root / SHARDS, text_set(CODECS[OURS])), samples, partial(packed, samples)
    ours = readers.Ours(root / SHARDS, text_set(CODECS[name]))
    return ours, samples, ours.expected(samples)


def take_turn(reader: Reader, order: str, cache: str, num_batches: int) -> Turn:
    """Read. From a cold cache one pass, from its start; from a warm one whole passes for a second, once under way."""
    gc.collect()
    with contextlib.closing(reader.stream(order)) as stream:
        if cache == WARM:
            for _ in itertools.islice(stream, min(_UNTIMED, num_batches)):
                pass
        disk_bytes, cpu_s, wall_s = _read_from_disk(), time.process_time(), time.perf_counter()
        count = 0
        while not count or (cache == WARM and time.perf_counter() - wall_s < _MIN_TURN_S):
            for _ in range(num_batches):
                next(stream)
            count += num_batches * BATCH_SIZE
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return Turn(count, wall_s, cpu_s, _read_from_disk() - disk_bytes)


def _read_from_disk() -> int:
    """Return how many bytes this process has had read from a disk, as Linux counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class Worker:
    """A reader in a process of its own, as its master sees it. To be used in a `with`."""

    def __init__(self, name: str, root: Path, python: Path) -> None:
        self.name, self.root = name, root
        paths = (path for folder in folders(name) for path in sorted((root / folder).rglob("*")))
        self._paths = [path for path in paths if path.is_file()]
        self._buffer = bytearray(_READ_BYTES)
        command = [str(python), "-m", "benchmarks.turns", name, str(root)]
        environment = {**os.environ, "TMPDIR": str(root)}  # streaming leaves files there
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT, env=environment
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the reader reads."""
        return sum(path.stat().st_size for path in self._paths)

    def wait(self) -> None:
        """Wait until the reader is open and has been checked."""
        self._answer()

    def take_turn(self, order: str, cache: str) -> Turn:
        """Prepare the page cache and let the reader read."""
        for path in self._paths:
            if cache == WARM:
                self._warm(path)
            else:
                _cool(path)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order} {cache}\n")
        self._process.stdin.flush()
        return Turn(**self._answer())

    def _warm(self, path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(self._buffer):
                pass

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended with {self._process.wait()}; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _cool(path: Path) -> None:
    """Drop a file from the page cache, which only holds for what the disk has."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def main() -> None:
    """Serve one reader."""
    name, root = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    torch.set_num_threads(1)
    reader, samples, expected = open_reader(name, root, load(root / SAMPLES))
    for order in (SEQUENTIAL, PLANNED):
        check(name, reader, samples, order, expected)
    answers.write("{}\n")
    for line in sys.stdin:
        order, cache = line.split()
        turn = take_turn(reader, order, cache, len(samples) // BATCH_SIZE)
        answers.write(json.dumps(asdict(turn)) + "\n")


if __name__ == "__main__":
    main()
