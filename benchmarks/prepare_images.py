"""Compressed photographs to the tensor that a VAE takes, against the reference's transforms, on one core.

    python -m benchmarks.prepare_images [--photos TAR ...] [--pictures N] [--rounds K] [--json FILE]

Every contender takes the same JPEGs of 2000 x 1500 pixels (quality 90, 4:2:0) to the same canvas, their bucket at
256 px, and ends with float32 (3, H, W) within -1 and 1:

    reference          the transforms of the PixArt-alpha reference: Pillow's full decode, torchvision's Resize
                       (bicubic), centre crop, ToTensor, Normalize; torchvision's calls spelled out
    ref. bilinear      the same with torchvision's default filter, as in its single-scale extraction
    full lanczos       Pillow's full decode and Lanczos: what the fidelity of the others is measured against
    draft              Pillow's JPEG draft at the nearest scale that covers the canvas, then bicubic: the usual advice
    ours               `images.decode` and `canvases.fit`, as `pixart extract` runs them

Pictures: with --photos, photographs from tars, each enlarged to the size ("enlarged"), and sixteen of them side by
side, each at about a quarter of the size ("mosaic"). An enlarged photograph has less detail than a camera's own pixels,
a mosaic more; a photograph taken at this size lies between. Without --photos, made-up pictures whose spectrum falls
with the frequency as that of photographs does, with edges and a little noise ("made up").

Each contender has a process of its own, whose malloc keeps what is freed. By default glibc may give images of 12 MB
back to the system and fault them in anew, each time or never, by what the process did before: that costs the reference
up to 12 ms a picture more, and ours nothing. Set GLIBC_TUNABLES to measure otherwise. The contenders take turns on one
pinned core, A B C A B C; a turn is all pictures, in CPU time of the thread. For each picture the fastest turn counts,
because other work on the machine only ever adds. A ratio is the median over the pictures. Nobody can avoid reading the
entropy-coded bits: the more bytes, the less is gained.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.read_shards import machine
from pixart_data.buckets import bucket_table, nearest_bucket, place
from pixart_data.canvases import fit, preparation
from pixart_data.images import Decoded, decode

WIDTH_PX, HEIGHT_PX, QUALITY = 2000, 1500, 90
_TILES = 4  # of a mosaic, in each direction
_BUCKETS = bucket_table(256)
_BUCKET = nearest_bucket(WIDTH_PX, HEIGHT_PX, _BUCKETS)
_PLACE = place(WIDTH_PX, HEIGHT_PX, _BUCKET)
_SIZE = (_PLACE.resized_width_px, _PLACE.resized_height_px)

_KEEP_FREED = "glibc.malloc.mmap_threshold=67108864:glibc.malloc.trim_threshold=268435456"

_Pixels = npt.NDArray[np.uint8]
_Steps = tuple[float, float, float]


class Reference:
    """Pillow's full decode, a resize of everything, a crop."""

    def __init__(self, name: str, resampling: Image.Resampling) -> None:
        self.name, self.resampling = name, resampling

    def decode(self, data: bytes) -> Image.Image:
        """Return the whole picture."""
        return Image.open(io.BytesIO(data)).convert("RGB")

    def fit(self, image: Image.Image) -> _Pixels:
        """Return the canvas (H, W, 3)."""
        left, top = _PLACE.crop_left_px, _PLACE.crop_top_px
        box = (left, top, left + _BUCKET.width_px, top + _BUCKET.height_px)
        return np.array(image.resize(_SIZE, self.resampling).crop(box))

    def to_tensor(self, pixels: _Pixels) -> Tensor:
        """Return the canvas (3, H, W) as torchvision's ToTensor and Normalize do."""
        x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return x.sub_(0.5).div_(0.5)


class Draft(Reference):
    """Pillow's draft at the nearest scale that still covers the canvas."""

    def decode(self, data: bytes) -> Image.Image:
        """Return the picture, shrunk."""
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", _SIZE)
        return image.convert("RGB")


class Ours:
    """This toolkit."""

    name = "ours"

    def decode(self, data: bytes) -> Decoded:
        """Return the picture, shrunk as far as its bucket allows."""
        return decode(data, max_pixels=10**8, buckets=_BUCKETS)

    def fit(self, decoded: Decoded) -> _Pixels:
        """Return the canvas (H, W, 3)."""
        return fit(decoded, _BUCKET)

    def to_tensor(self, pixels: _Pixels) -> Tensor:
        """Return the canvas (3, H, W) as `encoders.ImageEncoder` does with a batch."""
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


FULL = Reference("full lanczos", Image.Resampling.LANCZOS)
CONTENDERS: tuple[Reference | Ours, ...] = (
    Reference("reference", Image.Resampling.BICUBIC),
    Reference("ref. bilinear", Image.Resampling.BILINEAR),
    FULL,
    Draft("draft", Image.Resampling.BICUBIC),
    Ours(),
)


@dataclass(frozen=True)
class Result:
    """A line of the table: milliseconds of one core for each picture, means over the pictures; PSNR in dB."""

    pictures: str
    contender: str
    decode_ms: float
    fit_ms: float
    tensor_ms: float
    total_ms: float
    ratio: float
    ratio_lowest: float
    psnr_mean_db: float
    psnr_min_db: float


def psnr_db(found: _Pixels, wanted: _Pixels) -> float:
    """Return the peak signal-to-noise ratio of 8-bit pixels; 99 if they are the same."""
    error = np.mean((found.astype(np.float64) - wanted) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def photographs(tars: Sequence[Path]) -> list[Image.Image]:
    """Return the landscape JPEGs of tars."""
    pictures = []
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.lower().endswith((".jpg", ".jpeg")) else None
                image = Image.open(file).convert("RGB") if file else None
                if image is not None and image.width > image.height:
                    pictures.append(image)
    if len(pictures) < _TILES**2:
        raise SystemExit(f"--photos: expected at least {_TILES**2} landscape JPEGs in the tars, found {len(pictures)}")
    return pictures


def enlarged(pictures: Sequence[Image.Image], count: int) -> Iterator[Image.Image]:
    """Yield photographs brought to the size."""
    for i in range(count):
        picture = pictures[i * len(pictures) // count]
        yield ImageOps.fit(picture, (WIDTH_PX, HEIGHT_PX), Image.Resampling.LANCZOS)


def mosaics(pictures: Sequence[Image.Image], count: int) -> Iterator[Image.Image]:
    """Yield photographs side by side, at about their own resolution."""
    generator = np.random.default_rng(0)
    tile = (WIDTH_PX // _TILES, HEIGHT_PX // _TILES)
    for _ in range(count):
        canvas = Image.new("RGB", (WIDTH_PX, HEIGHT_PX))
        for i, chosen in enumerate(generator.choice(len(pictures), _TILES**2, replace=False)):
            at = (i % _TILES * tile[0], i // _TILES * tile[1])
            canvas.paste(ImageOps.fit(pictures[chosen], tile, Image.Resampling.LANCZOS), at)
        yield canvas


def made_up(count: int) -> Iterator[Image.Image]:
    """Yield pictures with an amplitude of frequency ** -1.4, shapes with sharp edges, and noise."""
    generator = np.random.default_rng(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(HEIGHT_PX), np.fft.rfftfreq(WIDTH_PX), indexing="ij")
    amplitude = np.maximum(np.hypot(fy, fx), 1 / WIDTH_PX) ** -1.4
    y, x = np.mgrid[0:HEIGHT_PX, 0:WIDTH_PX]
    for _ in range(count):
        planes = [
            np.fft.irfft2(amplitude * np.exp(2j * np.pi * generator.random(amplitude.shape)), (HEIGHT_PX, WIDTH_PX))
            for _ in range(3)
        ]
        grey, *colours = (plane / plane.std() for plane in planes)
        pixels = 127 + 45 * grey[..., None] + 12 * np.stack([colours[0], 0 * grey, colours[1]], axis=-1)
        for _ in range(40):
            cy, cx, radius_px = generator.random(3) * (HEIGHT_PX, WIDTH_PX, 150)
            inside = np.hypot(y - cy, (x - cx) * generator.uniform(0.3, 3)) < radius_px
            pixels[inside] += generator.normal(0, 40, 3)
        pixels += generator.normal(0, 1, pixels.shape)
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(pictures: Iterator[Image.Image]) -> list[bytes]:
    """Return them as JPEGs."""
    files = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
        files.append(file.getvalue())
    return files


def _timed(step: Callable[[Any], Any], value: Any) -> tuple[Any, float]:
    start_s = time.thread_time()
    result = step(value)
    return result, time.thread_time() - start_s


def time_once(contender: Reference | Ours, data: bytes) -> _Steps:
    """Return the milliseconds of decoding, of resizing and cropping, and of the way to a tensor."""
    image, decode_s = _timed(contender.decode, data)
    pixels, fit_s = _timed(contender.fit, image)
    tensor, tensor_s = _timed(contender.to_tensor, pixels)
    if tensor.shape != (3, _BUCKET.height_px, _BUCKET.width_px) or tensor.dtype != torch.float32:
        raise ValueError(f"{contender.name}: {tensor.dtype} {tuple(tensor.shape)} is not the canvas")
    return decode_s * 1e3, fit_s * 1e3, tensor_s * 1e3


def take_turn(index: int, files: Sequence[bytes]) -> list[_Steps]:
    """Prepare all pictures with a contender, in its process."""
    return [time_once(CONTENDERS[index], data) for data in files]


def take_turns(files: Sequence[bytes], rounds: int) -> dict[str, list[list[_Steps]]]:
    """Return the times of each contender, picture by picture, for each of its turns but the first."""
    turns: dict[str, list[list[_Steps]]] = {contender.name: [] for contender in CONTENDERS}
    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn, _pin)) for _ in CONTENDERS]
        for turn in range(rounds + 1):
            for index, (contender, pool) in enumerate(zip(CONTENDERS, pools, strict=True)):
                steps = pool.submit(take_turn, index, files).result()
                if turn:  # the first one imports and warms up
                    turns[contender.name].append(steps)
    return turns


def _pin() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def measure(kind: str, files: Sequence[bytes], rounds: int) -> list[Result]:
    """Let the contenders take turns on every picture; the first is the one that the others are compared with."""
    psnrs_db: dict[str, list[float]] = {contender.name: [] for contender in CONTENDERS}
    for data in files:
        wanted = FULL.fit(FULL.decode(data))
        for contender in CONTENDERS:
            pixels = contender.fit(contender.decode(data))  # type: ignore[arg-type]
            psnrs_db[contender.name].append(psnr_db(pixels, wanted))
    turns = take_turns(files, rounds)
    fastest = {name: [min(steps, key=sum) for steps in zip(*own, strict=True)] for name, own in turns.items()}
    first = [sum(steps) for steps in fastest[CONTENDERS[0].name]]
    results = []
    for name, steps in fastest.items():
        decode_ms, fit_ms, tensor_ms = (statistics.mean(column) for column in zip(*steps, strict=True))
        ratios = [base / sum(own) for base, own in zip(first, steps, strict=True)]
        results.append(
            Result(
                kind, name, decode_ms, fit_ms, tensor_ms, decode_ms + fit_ms + tensor_ms,
                statistics.median(ratios), min(ratios), statistics.mean(psnrs_db[name]), min(psnrs_db[name]),
            )
        )  # fmt: skip
    return results


def table(results: Sequence[Result]) -> str:
    """Return the results as text."""
    head = f"{'pictures':<9} {'':<17} {'decode':>7} {'resize, crop':>12} {'tensor':>6} {'total':>6} ms"
    lines = [f"{head}   times as fast (lowest)   PSNR mean, min dB"]
    for r in results:
        fidelity = f"{r.psnr_mean_db:5.1f} {r.psnr_min_db:5.1f}" if r.psnr_min_db < 99 else "itself"
        lines.append(
            f"{r.pictures:<9} {r.contender:<17} {r.decode_ms:>7.2f} {r.fit_ms:>12.2f} {r.tensor_ms:>6.2f} "
            f"{r.total_ms:>6.2f}      {r.ratio:>6.2f} ({r.ratio_lowest:.2f})            {fidelity}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    description = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_images", description=description)
    parser.add_argument("--photos", type=Path, nargs="+", default=[], metavar="TAR", help="tars of photographs")
    parser.add_argument("--pictures", type=int, default=12, help="of each kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    os.environ.setdefault("GLIBC_TUNABLES", _KEEP_FREED)  # read by the processes of the contenders when they start
    kinds: dict[str, Iterator[Image.Image]] = {"made up": made_up(options.pictures)}
    if options.photos:
        photos = photographs(options.photos)
        kinds = {"enlarged": enlarged(photos, options.pictures), "mosaic": mosaics(photos, options.pictures)}
    results = []
    for kind, pictures in kinds.items():
        files = encoded(pictures)
        sys.stderr.write(f"{kind}: {len(files)} pictures, {sum(map(len, files)) / len(files) / 1e3:,.0f} kB each\n")
        results += measure(kind, files, options.rounds)
    sys.stdout.write(table(results) + "\n")
    facts: dict[str, str | int] = {"pictures": options.pictures, "rounds": options.rounds, "ours": preparation()}
    facts |= machine()
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    if options.json:
        report = {"facts": facts, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
