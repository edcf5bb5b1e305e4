"""Decoded images to the canvases of their buckets.

The resize is one pass of Lanczos, antialiased. PyTorch's for 8-bit pixels is several times as fast as Pillow's and
differs from it by one level in a value out of two hundred; `preparation` names the one that is used, because features
made with one are not byte for byte those made with the other.
"""

import functools
import importlib.metadata
import socket

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixart_data import jpegs
from pixart_data.buckets import Bucket, Placement, place
from pixart_data.errors import JobError
from pixart_data.images import Decoded

_POLICY = "dct-1"  # a new name whenever the same image comes out otherwise
_FILTER = "lanczos"
_LANCZOS_SINCE = (2, 13)  # of PyTorch, on a CPU
_UP = 1 + 1e-9  # lest a side that should come out whole be a rounding error short of it, and cut
_MAX_WASTE = 2  # PyTorch resizes also what the crop then drops; a banner a thousand times as long as high is Pillow's


def preparation() -> str:
    """Name all that decides, beside the bucket table, which pixels an image becomes on this machine."""
    return f"{_POLICY}, {jpegs.decoder()}, {_resizer()} {_FILTER}"


def require(expected: str) -> None:
    """Compare the preparation of this machine with that of another.

    Raises:
        JobError: If they differ.
    """
    found = preparation()
    if found != expected:
        raise JobError(
            f"image preparation on {socket.gethostname()}: expected {expected!r}, as on the machine that started the "
            f"job, found {found!r}; install the same packages on every node (constraints.txt)"
        )


def fit(decoded: Decoded, bucket: Bucket) -> NDArray[np.uint8]:
    """Resize to cover a bucket and cut its centre, as `buckets.place` says of the original's size.

    Returns:
        Pixels (H, W, 3) of the bucket's height and width.
    """
    placement = place(decoded.width_px, decoded.height_px, bucket)
    left, top, _, _ = decoded.box
    area_px = placement.resized_width_px * placement.resized_height_px
    small = area_px <= _MAX_WASTE * bucket.width_px * bucket.height_px
    if small and left == 0 and top == 0 and _resizer() == "torch":
        return _fit_with_torch(decoded, bucket, placement)
    return _fit_with_pillow(decoded, bucket, placement)


@functools.cache
def _resizer() -> str:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "pillow"
    return "torch" if tuple(map(int, version.split(".")[:2])) >= _LANCZOS_SINCE else "pillow"


def _fit_with_torch(decoded: Decoded, bucket: Bucket, placement: Placement) -> NDArray[np.uint8]:
    """Resize all, cut then; one thread, and the interpreter is free meanwhile."""
    import torch
    from torch.nn.functional import interpolate

    pixels = decoded.pixels
    x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, H, W), channels last in memory: so is the result
    height_px, width_px = placement.resized_height_px, placement.resized_width_px
    _, _, right, bottom = decoded.box
    if (bottom, right) == pixels.shape[:2]:
        y = interpolate(x, size=(height_px, width_px), mode=_FILTER, antialias=True)
    else:  # the original ends within the last column or row: so does the result, which is cut
        scales = (height_px / bottom * _UP, width_px / right * _UP)
        y = interpolate(x, scale_factor=scales, mode=_FILTER, antialias=True)
    left, top = placement.crop_left_px, placement.crop_top_px
    y = y[0, :, top : top + bucket.height_px, left : left + bucket.width_px]  # (3, H, W)
    return np.ascontiguousarray(y.permute(1, 2, 0).numpy())


def _fit_with_pillow(decoded: Decoded, bucket: Bucket, placement: Placement) -> NDArray[np.uint8]:
    """Resize exactly the pixels that the crop keeps, widened by the filter."""
    left, top, right, bottom = decoded.box
    scale_x = (right - left) / placement.resized_width_px
    scale_y = (bottom - top) / placement.resized_height_px
    kept = (
        left + placement.crop_left_px * scale_x,
        top + placement.crop_top_px * scale_y,
        min(left + (placement.crop_left_px + bucket.width_px) * scale_x, right),
        min(top + (placement.crop_top_px + bucket.height_px) * scale_y, bottom),
    )
    size = (bucket.width_px, bucket.height_px)
    return np.array(decoded.image.resize(size, Image.Resampling[_FILTER.upper()], box=kept, reducing_gap=None))
