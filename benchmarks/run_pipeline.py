"""Images to features, end to end: what the scheduler costs, how it scales, and what one would use instead.

    python -m benchmarks.run_pipeline [--images N] [--rounds K] [--ways WAY ...] [--photos TAR ...] [--json FILE]

The same photographs in tars of 100 go through the same small VAE (a miniature: with a real one on a GPU, less of the
time would be the pipeline's) in these ways, taking turns, A B C A B C, each in a process of its own:

    bare         this toolkit's stage called in a loop, one process, commits included: no Ray
    ray, 1       the pipeline: the same stage in one Ray worker, by the scheduler that `pixart extract` uses
    ray, 2       with two workers
    bare, 1 core; ray, 1 and 2, a core each    the same with every worker held to a core of its own, as on machines of
                 their own; the ratio of two to one is taken from these
    reference    the extraction loop of the PixArt-alpha reference: decode, bilinear resize, centre crop, batch 1, fp32
                 moments of each image to a .npy file of its own; one process, two loader threads for its decoding
    ray data     read_webdataset, decode tasks, a VAE in one actor with batches of 16, Parquet: a plain Ray Data job

Time runs from when the models are loaded to the last commit; for Ray Data, whose start cannot be told apart, from the
first batch that reaches the model to the last. The peak of the object store and the workers' memory are shown for all
images and for a quarter of them: neither may grow with the number of shards.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.prepare_images import made_up, photographs
from benchmarks.read_shards import machine
from pixart_data.commits import read_records, write_record
from pixart_data.sections import ImageFeatures, Source

_PER_TAR = 100
_SIDE_PX = (960, 720)
_BATCH = 16
_DISTINCT = 60
_WAYS = ("bare", "ray 1", "ray 2", "bare, 1 core", "ray 1, 1 core", "ray 2, 1 core each", "reference", "ray data")


@dataclass(frozen=True)
class Turn:
    """What one way took: images per second, and for Ray the object store's and a worker's peak."""

    images_per_s: float
    store_bytes: int = 0
    worker_bytes: int = 0


def build(folder: Path, count: int, photos: Sequence[Path]) -> None:
    """Write tars of photographs of 960 x 720 px and the small VAE."""
    from pixart_data.miniatures import build_vae

    pictures = photographs(photos) if photos else list(itertools.islice(made_up(_DISTINCT), _DISTINCT))
    data = []
    for picture in pictures[:_DISTINCT]:
        buffer = io.BytesIO()
        picture.convert("RGB").resize(_SIDE_PX).save(buffer, "JPEG", quality=88)
        data.append(buffer.getvalue())
    for number in range(-(-count // _PER_TAR)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(number * _PER_TAR, min(count, (number + 1) * _PER_TAR)):
                info = tarfile.TarInfo(f"{i:08d}.jpg")
                info.size = len(data[i % len(data)])
                tar.addfile(info, io.BytesIO(data[i % len(data)]))
    build_vae(folder / "vae")


def make_stage(folder: Path, output: Path, cores: tuple[int, ...] | None) -> Any:
    """Build the stage of `pixart extract`, on all cores or on one that no other worker has."""
    from pipelines.images import ImageStage
    from pixart_data.canvases import preparation

    torch.set_num_threads(1)
    if cores is not None:
        core = _take_core(output, cores)
        for thread in Path("/proc/self/task").iterdir():  # those that Ray made beforehand, too
            os.sched_setaffinity(int(thread.name), {core})
    config = ImageFeatures(model=str(folder / "vae"), batch_size=_BATCH)
    return ImageStage(output, Source(paths=[str(folder)]), config, preparation())


def _take_core(output: Path, cores: Iterable[int]) -> int:
    for core in cores:
        try:
            (output / f"core-{core}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return core
    raise RuntimeError("more workers than cores")


def bare(folder: Path, output: Path, tars: int, cores: tuple[int, ...] | None) -> Turn:
    """Call the stage in a loop."""
    from pixart_data.sources import find_units

    stage = make_stage(folder, output, cores)
    units = find_units(Source(paths=[str(folder)]))[:tars]
    started_s = time.monotonic()
    for unit in units:
        write_record(output, stage(unit, lambda rows, rejected: None), replaces=False)
    return _turn(output, started_s)


def on_ray(folder: Path, output: Path, tars: int, cores: tuple[int, ...] | None, workers: int) -> Turn:
    """Run the pool that `pixart extract` runs."""
    import ray

    from pipelines.cluster import Share
    from pipelines.pool import Pool
    from pixart_data.sources import find_units

    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=workers, object_store_memory=128 << 20, **quiet)
    watch = _Watch(workers)
    units = find_units(Source(paths=[str(folder)]))[:tars]
    pool = Pool(partial(make_stage, folder, output, cores), Share(workers, 1.0, 0.0), 1, watch, units_per_worker=2)
    peak = 0
    for done, _ in pool.work(units):
        write_record(output, done.record, replaces=False)
        peak = max(peak, done.peak_rss_bytes)
    turn = _turn(output, watch.started_s, watch.store_bytes, peak)
    ray.shutdown()
    return turn


class _Watch:
    """Takes the time from when all workers are up, and the object store's peak."""

    def __init__(self, workers: int) -> None:
        self.wanted = workers
        self.started_s = float("inf")
        self.store_bytes = 0

    def workers(self, num_working: int, num_waiting: int) -> None:
        from pipelines.metrics import object_store_bytes

        if num_working >= self.wanted:
            self.started_s = min(self.started_s, time.monotonic())
        self.store_bytes = max(self.store_bytes, object_store_bytes() or 0)

    def live(self, rows: int, rejected: int) -> None:
        pass

    def unit_failed(self, unit: str, attempt: int, reason: str, final: bool) -> None:
        raise RuntimeError(f"{unit}: {reason}")

    def note(self, kind: str, count: int = 1) -> None:
        raise RuntimeError(kind)


def _turn(output: Path, started_s: float, store_bytes: int = 0, worker_bytes: int = 0) -> Turn:
    seconds = time.monotonic() - started_s
    rows = sum(record.rows_out for record in read_records(output).values())
    return Turn(rows / seconds, store_bytes, worker_bytes)


def _transform(data: bytes) -> torch.Tensor:
    """The reference's transforms at 256 px: short side to 256, centre crop, to tensor, normalise."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    pixels = np.array(image.crop((left, top, left + 256, top + 256)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255).sub_(0.5).div_(0.5)


def _members(folder: Path, tars: int) -> Iterable[tuple[str, bytes]]:
    for path in sorted(folder.glob("*.tar"))[:tars]:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    yield member.name.split(".")[0], file.read()


def _load_vae(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    return AutoencoderKL.from_pretrained(folder / "vae").eval()


@torch.inference_mode()
def _moments(vae: Any, x: torch.Tensor) -> Any:
    posterior = vae.encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float().numpy()


def reference(folder: Path, output: Path, tars: int) -> Turn:
    """Encode image by image, a file for each."""
    vae = _load_vae(folder)
    count = 0
    started_s = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        for name, x in _ahead(threads, _members(folder, tars)):
            np.save(output / f"{name}.npy", _moments(vae, x[None])[0])
            count += 1
    return Turn(count / (time.monotonic() - started_s))


def _ahead(threads: ThreadPoolExecutor, members: Iterable[tuple[str, bytes]]) -> Iterable[tuple[str, torch.Tensor]]:
    pending: list[tuple[str, Any]] = []
    for name, data in members:
        pending.append((name, threads.submit(_transform, data)))
        if len(pending) > 2 * _BATCH:
            first, future = pending.pop(0)
            yield first, future.result()
    for name, future in pending:
        yield name, future.result()


def ray_data(folder: Path, output: Path, tars: int) -> Turn:
    """A plain Ray Data job, as its documentation shows one."""
    import ray
    from ray.data import ActorPoolStrategy

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    times = output / "times"
    times.mkdir()

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"key": batch["__key__"], "x": np.stack([_transform(data).numpy() for data in batch["jpg"]])}

    class Encode:
        def __init__(self) -> None:
            self.vae = _load_vae(folder)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            (times / f"{time.time():.6f}-{len(batch['key'])}").touch()
            moments = _moments(self.vae, torch.from_numpy(np.stack(batch["x"])))
            (times / f"{time.time():.6f}-0").touch()
            return {"key": batch["key"], "moments": moments.astype(np.float16)}

    paths = [str(path) for path in sorted(folder.glob("*.tar"))[:tars]]
    data = ray.data.read_webdataset(paths, decoder=None, suffixes=["jpg"], num_cpus=0.25)
    data = data.map_batches(decode, batch_size=_BATCH, num_cpus=0.5)
    data = data.map_batches(Encode, batch_size=_BATCH, compute=ActorPoolStrategy(size=1), num_cpus=1)
    data.write_parquet(str(output / "parquet"))
    marks = sorted(path.name.split("-") for path in times.iterdir())
    ray.shutdown()
    return Turn(sum(int(count) for _, count in marks) / (float(marks[-1][0]) - float(marks[0][0])))


def take_turn(way: str, folder: Path, tars: int) -> Turn:
    """Do one way in a process of its own and return what it took."""
    command = [sys.executable, "-m", "benchmarks.run_pipeline", "--turn", way, str(folder), str(tars)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return Turn(**json.loads(done.stdout.splitlines()[-1]))


def _do_turn(way: str, folder: Path, tars: int) -> Turn:
    cores = tuple(sorted(os.sched_getaffinity(0))) if "1 core" in way else None
    with tempfile.TemporaryDirectory() as output:
        ways: dict[str, Callable[[], Turn]] = {
            "bare": lambda: bare(folder, Path(output), tars, cores),
            "reference": lambda: reference(folder, Path(output), tars),
            "ray data": lambda: ray_data(folder, Path(output), tars),
            "ray 1": lambda: on_ray(folder, Path(output), tars, cores, 1),
            "ray 2": lambda: on_ray(folder, Path(output), tars, cores, 2),
        }
        return ways[way.split(",")[0]]()


def measure(folder: Path, tars: int, rounds: int, ways: Sequence[str]) -> dict[str, list[Turn]]:
    """Let ways take turns."""
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            turns[way].append(take_turn(way, folder, tars))
    return turns


def ratio(turns: dict[str, list[Turn]], way: str, to: str) -> float:
    """Return the median over the rounds of one way's speed by another's."""
    pairs = zip(turns[way], turns[to], strict=True)
    return statistics.median(a.images_per_s / b.images_per_s for a, b in pairs)


def table(turns: dict[str, list[Turn]], fewer: Turn) -> str:
    """Return the results as text."""
    lines = [f"{'way':<22} {'images/s':>9}  to bare"]
    for way, taken in turns.items():
        speed = statistics.median(turn.images_per_s for turn in taken)
        lines.append(f"{way:<22} {speed:>9.1f}  {ratio(turns, way, 'bare'):.2f}")
    for way, to in (("ray 1, 1 core", "bare, 1 core"), ("ray 2, 1 core each", "ray 1, 1 core")):
        if way in turns and to in turns:
            lines.append(f"{way} to {to}: {ratio(turns, way, to):.2f}")
    last = turns["ray 1"][-1]
    lines += [
        f"peaks, all images / a quarter: object store {last.store_bytes / 1e6:.1f} / {fewer.store_bytes / 1e6:.1f} MB, "
        f"worker {last.worker_bytes / 1e6:.0f} / {fewer.worker_bytes / 1e6:.0f} MB",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="tars of photographs; else made up")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--ways", nargs="*", choices=_WAYS[2:], help="only these, beside bare and ray 1")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        sys.stdout.write(f"{json.dumps(asdict(_do_turn(args.turn[0], Path(args.turn[1]), int(args.turn[2]))))}\n")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, args.images, args.photos)
        tars = -(-args.images // _PER_TAR)
        take_turn("bare", folder, max(1, tars // 4))  # warms the page cache
        turns = measure(folder, tars, args.rounds, [*_WAYS[:2], *(args.ways or _WAYS[2:])])
        fewer = take_turn("ray 1", folder, max(1, tars // 4))
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    what = f"{args.images} photographs of {_SIDE_PX[0]} x {_SIDE_PX[1]} px"
    sys.stdout.write(f"{facts}\n{what}\n\n{table(turns, fewer)}\n")
    if args.json:
        results = {way: [asdict(turn) for turn in taken] for way, taken in turns.items()}
        args.json.write_text(json.dumps({"machine": machine(), "turns": results}, indent=1))


if __name__ == "__main__":
    main()
