import functools
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_data import canvases
from pixart_data.buckets import Bucket, bucket_table, nearest_bucket, place
from pixart_data.canvases import fit, preparation, require
from pixart_data.errors import JobError
from pixart_data.images import Decoded, decode

RESIZERS = ["torch", "pillow"]
LIMIT = 10**8
SMALL = (Bucket("0.75", 48, 64), Bucket("1.00", 56, 56), Bucket("1.33", 64, 48))  # quicker to test than 256 px


@pytest.fixture(params=RESIZERS)
def resizer(request, monkeypatch):
    monkeypatch.setattr(canvases, "_resizer", lambda: request.param)
    return request.param


@functools.cache
def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Waves of all lengths down to two pixels, an edge, and noise: as much detail as the sharpest photographs have."""
    generator = np.random.default_rng(seed)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    amplitude = np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** -1.25
    phases = np.exp(2j * np.pi * generator.random(amplitude.shape))
    grey = np.fft.irfft2(amplitude * phases, (height, width))
    pixels = 127 + 45 * np.stack([grey, np.roll(grey, 9, 0), np.roll(grey, 9, 1)], axis=-1) / grey.std()
    pixels[height // 3 :, width // 2 :] *= 0.5
    return Image.fromarray((pixels + generator.normal(0, 1, pixels.shape)).clip(0, 255).astype(np.uint8))


def whole(image: Image.Image) -> Decoded:
    return Decoded(image, image.width, image.height, "", (0, 0, image.width, image.height))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def lanczos(image: Image.Image, bucket: Bucket) -> np.ndarray:
    """What a canvas is to be: everything resized, then cut."""
    placement = place(image.width, image.height, bucket)
    left, top = placement.crop_left_px, placement.crop_top_px
    resized = image.resize((placement.resized_width_px, placement.resized_height_px), Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + bucket.width_px, top + bucket.height_px)), dtype=int)


def psnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((found.astype(float) - wanted) ** 2), 1e-9))


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (333, 500), (40, 31), (512, 512), (1999, 301)])
def test_fit_is_resize_then_crop(resizer, width, height):
    image = photo(width, height)
    bucket = nearest_bucket(width, height, bucket_table(256))
    found = fit(whole(image), bucket)
    assert found.shape == (bucket.height_px, bucket.width_px, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    error = np.abs(found - lanczos(image, bucket))
    assert error.max() <= 2
    assert (error > 0).mean() < 0.05


def test_fit_leaves_what_fits_alone(resizer):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 288, 3), dtype=np.uint8))
    assert np.array_equal(fit(whole(noise), Bucket("0.89", 256, 288)), np.asarray(noise))
    assert np.array_equal(fit(whole(noise), Bucket("1.00", 256, 256)), np.asarray(noise)[:, 16:272])


def test_black_beside_white_stays_within_the_range(resizer):
    board = Image.fromarray((np.indices((700, 900)).sum(axis=0) // 3 % 2 * 255).astype(np.uint8)).convert("RGB")
    bucket = nearest_bucket(900, 700, bucket_table(256))
    assert np.abs(fit(whole(board), bucket) - lanczos(board, bucket)).max() <= 2


def test_a_banner_costs_no_more_than_its_canvas(monkeypatch):
    image = Image.new("RGB", (60_000, 30), (9, 120, 200))  # resized as a whole it would be 256,000 x 128
    monkeypatch.setattr(canvases, "_fit_with_torch", None)
    bucket = nearest_bucket(*image.size, bucket_table(256))
    assert (fit(whole(image), bucket) == (9, 120, 200)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(300, 226), (303, 225), (257, 322), (259, 517), (1029, 771)])
def test_a_shrunk_jpeg_has_the_geometry_of_the_whole(resizer, width, height, orientation):
    """Sides that are no multiple of what they are shrunk by would move an edge, by more at the far end.

    257 x 322: 322 / 2 * (64 / (322 / 2)) is a rounding error less than 64.
    """
    stored = (height, width) if orientation >= 5 else (width, height)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photo(*stored), subsampling=0, exif=exif)
    buckets = SMALL
    shrunk, full = decode(data, max_pixels=LIMIT, buckets=buckets), decode(data, max_pixels=LIMIT)
    assert "draft" in shrunk.ops
    assert shrunk.image.size < full.image.size
    assert (shrunk.width_px, shrunk.height_px) == (full.width_px, full.height_px) == (width, height)
    bucket = nearest_bucket(width, height, buckets)
    assert fit(shrunk, bucket).shape == (bucket.height_px, bucket.width_px, 3)
    assert psnr_db(fit(shrunk, bucket), fit(full, bucket)) > 45


@pytest.mark.parametrize("size", [(2000, 1500), (1030, 1030), (1201, 2101)])
def test_prepared_photographs_look_as_those_of_a_full_decode(size):
    buckets = bucket_table(256)
    bucket = nearest_bucket(*size, buckets)
    data = jpeg(photo(*size))
    decoded = decode(data, max_pixels=LIMIT, buckets=buckets)
    assert decoded.ops.startswith("draft")
    assert psnr_db(fit(decoded, bucket), lanczos(Image.open(io.BytesIO(data)), bucket)) > 44


def test_preparation_is_the_same_every_time_on_any_number_of_threads():
    buckets = SMALL
    files = [jpeg(photo(301 + 7 * i, 257, seed=i)) for i in range(4)]

    def prepare(data: bytes) -> bytes:
        decoded = decode(data, max_pixels=LIMIT, buckets=buckets)
        return fit(decoded, nearest_bucket(decoded.width_px, decoded.height_px, buckets)).tobytes()

    alone = [prepare(data) for data in files]
    before = torch.get_num_threads()
    torch.set_num_threads(before % 2 + 1)
    try:
        with ThreadPoolExecutor(4) as executor:
            assert list(executor.map(prepare, files * 3)) == alone * 3
    finally:
        torch.set_num_threads(before)


def test_the_name_of_the_preparation_tells_what_does_it(monkeypatch):
    assert preparation() == "dct-1, simplejpeg, torch lanczos"
    monkeypatch.setattr(canvases.jpegs, "decoder", lambda: "pillow")
    monkeypatch.setattr(canvases, "_resizer", lambda: "pillow")
    assert preparation() == "dct-1, pillow, pillow lanczos"


@pytest.mark.parametrize(("version", "resizer"), [("2.13.0+cpu", "torch"), ("3.0", "torch"), ("2.4.1", "pillow")])
def test_an_old_torch_has_no_lanczos(monkeypatch, version, resizer):
    monkeypatch.setattr(canvases.importlib.metadata, "version", lambda name: version)
    assert canvases._resizer.__wrapped__() == resizer


def test_a_machine_that_prepares_otherwise_is_refused():
    require(preparation())
    with pytest.raises(JobError, match="expected 'dct-1, pillow, pillow lanczos'.*found 'dct-1, simple.*install"):
        require("dct-1, pillow, pillow lanczos")
