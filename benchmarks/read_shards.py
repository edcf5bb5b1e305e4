"""Training batches from feature shards, against the layouts a user would pick instead.

    python -m benchmarks.read_shards [--samples N] [--rounds K] [--peers PYTHON] [--folder DIR] [--json FILE]

The same synthetic samples (`benchmarks.samples`) are written in every layout, and read in batches of 64 that are ready
for the device: contiguous tensors in host memory. Each reader is one process without workers:

    ours         this toolkit, bf16, packed; threads, every sample checked against its CRC
    ours-packed  the same with the lossless codec, ours-int8 with the other: parts go to the device, which decodes them
    pread        one thread, two positioned reads for each sample, of the bytes of `ours` in its order, into one buffer
    mosaic       MosaicML's StreamingDataset over MDS, in an environment of its own (`benchmarks/peers.txt`); packed
    webdataset   image and text of a sample merged into one tar member; packed
    reference    PixArt-alpha's: an .npz and an .npy for each sample; fp32, padded to 120 tokens. Compressing takes it a
                 third of a CPU-second for each sample, so it reads the first ones only

Packing is less work than the padding of the usual collations, and its memory is used again: mosaic and webdataset are
read better here than their guides would have it. Before anything is timed, a pass of every reader in each order is
compared with what was written, bit by bit. Then they take turns, A B C A B C. "planned" is the shuffled order of each:
a full shuffle for ours, pread and reference, `py1e` for mosaic, shards and a buffer of 500 samples for webdataset.

Before a turn from a cold cache the files are flushed and dropped from the page cache (the host's, below a virtual
machine, is out of reach); before one from a warm cache they are read once. That it worked is seen from the bytes that
Linux counts as read from a disk. A cold turn is one pass from its start; a warm one passes for at least a second,
after 16 batches that are not timed.

A ratio is the median of the ratios inside each round. The limits are of samples per second in one process; the same
per CPU-second (user and system, all threads: ours has two, the others one) stands beside it. The exit code is 1 if a
limit is missed. The last column is what the bare loop reaches in our place: where that is below a limit, as on a cold
cache it is below 40 times a reader that waits for its CPU, the verdict is DISK. torch computes with one thread.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import layouts, ratios, samples, turns
from benchmarks.batches import BATCH_SIZE, PLANNED, SEQUENTIAL
from benchmarks.turns import COLD, MOSAIC, WARM, Turn, Worker

PEERS = Path(__file__).parent.parent / ".venv-peers/bin/python"

_BYTES_PER_SAMPLE = 4_000_000  # all layouts together, in the making
_ZSTD = "mds-zstd"
_COLD_SHARE, _WARM_SHARE = 0.8, 0.05  # of the bytes: at least and at most from the disk
_TRIES = 3


def write(root: Path, made: samples.Samples, reference_samples: int, peers: Path | None) -> dict[str, int]:
    """Write every layout under `root`; return bytes per sample of each."""
    made.save(root / turns.SAMPLES)
    layouts.write_images(root / turns.SHARDS / turns.IMAGE_SET, made)
    for codec in turns.CODECS.values():
        layouts.write_texts(root / turns.SHARDS / turns.text_set(codec), made, codec)
    layouts.write_merged(root / turns.MERGED, made)
    layouts.write_files(root / turns.FILES, made, reference_samples)
    names = [*turns.CODECS, turns.WEBDATASET]
    sizes = {name: sum(_size_bytes(root / folder) for folder in turns.folders(name)) // len(made) for name in names}
    sizes[turns.REFERENCE] = _size_bytes(root / turns.FILES) // reference_samples
    if peers:
        for compression, folder in (("none", turns.MDS), ("zstd", _ZSTD)):
            _run_peer(peers, [str(root / turns.SAMPLES), str(root / folder), compression])
            sizes[f"{MOSAIC}, {compression}"] = _size_bytes(root / folder) // len(made)
        shutil.rmtree(
            root / _ZSTD
        )  # on the first pass the library unpacks it, and then reads what the other layout has
    return sizes


def _run_peer(peers: Path, arguments: list[str]) -> None:
    command = [str(peers), "-m", "benchmarks.mosaic", *arguments]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, stdout=sys.stderr)


def _size_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def measure(root: Path, names: Sequence[str], peers: Path, rounds: int) -> ratios.Turns:
    """Let the readers take turns."""
    with ExitStack() as stack:
        workers = []
        for name in names:
            python = peers if name == MOSAIC else Path(sys.executable)
            workers.append(stack.enter_context(Worker(name, root, python)))
        for worker in workers:
            worker.wait()
        taken: ratios.Turns = {}
        for number in range(rounds):
            sys.stderr.write(f"round {number + 1} of {rounds}\n")
            for cache in (WARM, COLD):
                for order in (SEQUENTIAL, PLANNED):
                    own = taken.setdefault((cache, order), {name: [] for name in names})
                    for worker in workers:
                        own[worker.name].append(_take_turn(worker, order, cache))
    return taken


def _take_turn(worker: Worker, order: str, cache: str) -> Turn:
    """Return a turn whose bytes came from where they should.

    Raises:
        RuntimeError: If they do not: the page cache cannot be filled, or cannot be dropped.
    """
    for _ in range(_TRIES):
        turn = worker.take_turn(order, cache)
        share = turn.from_disk_bytes / worker.size_bytes
        if (share >= _COLD_SHARE) if cache == COLD else (share <= _WARM_SHARE):
            return turn
    raise RuntimeError(
        f"{worker.root}: {worker.name}: expected a {cache} cache, found {share:.0%} of the bytes read from the disk, "
        f"{_TRIES} times; choose a folder on a disk with --folder, free some memory, or read fewer --samples"
    )


def machine() -> dict[str, str | int]:
    """Return what the figures depend on: cores, processor, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, str | int] = {"cores": os.cpu_count() or 0, "cpu": (models or [platform.machine()])[0]}
    facts |= {"load": f"{os.getloadavg()[0]:.1f}", "python": platform.python_version()}
    return facts | {name: importlib.metadata.version(name) for name in ("numpy", "torch", "webdataset", "safetensors")}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def _several_batches(text: str) -> int:
    value = int(text)
    if value < 2 * BATCH_SIZE:
        raise argparse.ArgumentTypeError(f"expected at least two batches of {BATCH_SIZE}, got {value}")
    return value


def _options() -> argparse.Namespace:
    description = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.read_shards", description=description)
    parser.add_argument(
        "--samples", type=_several_batches, default=4000, metavar="N", help="4 MB of disk each (default: %(default)s)"
    )
    parser.add_argument(
        "--reference-samples", type=_several_batches, default=2 * BATCH_SIZE, metavar="N",
        help="how many of them the reference reads; writing takes 0.4 CPU-seconds each (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=_positive, default=3, metavar="K", help="(default: %(default)s)")
    parser.add_argument(
        "--peers", type=Path, default=PEERS, metavar="PYTHON", help="with benchmarks/peers.txt (default: %(default)s)"
    )
    parser.add_argument(
        "--without", choices=turns.READERS[1:], nargs="+", default=[], metavar="READER", help="some of %(choices)s"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="on the disk to read from (default: TMPDIR, or /tmp)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    if MOSAIC not in options.without and not options.peers.is_file():
        parser.error(
            f"--peers: expected a Python that has benchmarks/peers.txt, found no {options.peers}; `make bench` makes "
            "one, and `--without mosaic` does without it"
        )
    free, needed = shutil.disk_usage(options.folder or tempfile.gettempdir()).free, options.samples * _BYTES_PER_SAMPLE
    if free < needed:
        parser.error(
            f"--folder: expected {needed / 1e9:.0f} GB of free disk for {options.samples} samples, "
            f"found {free / 1e9:.0f} GB; choose another folder or fewer --samples"
        )
    options.reference_samples = min(options.reference_samples, options.samples)
    return options


def main() -> None:
    """Run the benchmark."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes are to be deleted
    torch.set_num_threads(1)
    facts: dict[str, Any] = machine()
    names = [name for name in turns.READERS if name not in options.without]
    sys.stderr.write(f"writing {options.samples} samples in all layouts\n")
    with tempfile.TemporaryDirectory(prefix="read_shards-", dir=options.folder) as folder:
        root = Path(folder)
        peers = options.peers if MOSAIC in names else None
        sizes = write(root, samples.make(options.samples), options.reference_samples, peers)
        taken = measure(root, names, options.peers, options.rounds)
    speeds, shares = ratios.speeds(taken), ratios.sizes(sizes)
    verdicts: list[ratios.Speed | ratios.Size] = [*speeds, *shares]
    tables = (ratios.rate_table(taken), ratios.speed_table(speeds), ratios.size_table(shares, sizes))
    sys.stdout.write("\n\n".join(tables) + "\n\n")
    settings = {"samples": options.samples, "reference_samples": options.reference_samples, "rounds": options.rounds}
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in {**settings, **facts}.items()) + "\n")
    if options.json:
        report: dict[str, Any] = {
            "machine": facts,
            "settings": settings,
            "bytes_per_sample": sizes,
            "turns": ratios.rows(taken),
        }
        report["ratios"] = [asdict(one) | {"missed": one.missed} for one in verdicts]
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(one.missed for one in verdicts))


if __name__ == "__main__":
    main()
