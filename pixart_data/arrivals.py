"""What the readers of foreign layouts find: a sample's features as some other tool stored them, brought to our form.

Legend: C latent channels, h w latent cells of 8 px, n tokens of a caption, L those with padding, D text width.
"""

import contextlib
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from pixart_data.records import Reason

Array = npt.NDArray[Any]
CELL_PX = 8
NULL_CAPTION = "null_caption.npz"
"""Beside an export: the features of the empty caption, as the reference would store a caption's."""

MAX_TOKENS = 4096
"""Of a caption; the longest that anything here is trained with is 300."""

_MAX_WIDTH = 1 << 14
_MAX_CELLS = 1 << 20  # of an image: 8192 x 8192 px
_MAX_SIDE_PX = 1 << 20
_OF_KEYS = frozenset(string.ascii_letters + string.digits + "_-%~")


class Unusable(Exception):  # noqa: N818  not an error: a fact about a row, which becomes its reason
    """A sample cannot be taken; says why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Arrival:
    """A sample of a foreign layout, or the reason why there is none.

    Attributes:
        key: Joins the sample's image and text.
        values: Posterior mean and standard deviation (2, C, h, w), unscaled, or text features (n, D).
        caption: What was encoded, where the layout says so.
        original_px: Height and width of the original image, where the layout says so.
        num_padded: Tokens of the text as it was stored, padding included.
    """

    key: str
    values: Array | None = None
    caption: str | None = None
    original_px: tuple[int, int] | None = None
    num_padded: int = 0
    error: Reason | None = None
    detail: str = ""


@dataclass(frozen=True)
class Portion:
    """The part of a foreign layout that is one unit of work.

    Attributes:
        id: Safe as the stem of a file name.
        fingerprint: Changes when the portion is cut differently or its list changes.
        content: What its reader needs to find it again.
    """

    id: str
    fingerprint: str
    num_rows: int
    content: Any = field(default=None)


class Reader(Protocol):
    """Reads a foreign layout. Both iterators of a portion yield the same keys in the same order."""

    def portions(self) -> list[Portion]:
        """Cut the layout into units of work."""

    def images(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the posteriors of a portion."""

    def texts(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the text features of a portion."""


@dataclass
class Rounding:
    """What was lost in storing values as narrower types.

    Attributes:
        samples: Samples with a value that is not what was found.
        values: Such values.
        max_error: The largest absolute difference.
    """

    samples: int = 0
    values: int = 0
    max_error: float = 0.0

    def add(self, other: "Rounding") -> None:
        """Add another's counts."""
        self.samples += other.samples
        self.values += other.values
        self.max_error = max(self.max_error, other.max_error)


def is_key(text: Any) -> TypeGuard[str]:
    """Tell whether a text is a key of a sample as it stands, safe as the name of a member."""
    parts: Sequence[str] = text.split("/") if isinstance(text, str) else [""]
    return all(part and not set(part) - _OF_KEYS for part in parts)


@contextlib.contextmanager
def conversion(where: str) -> Iterator[None]:
    """Make what conversions raise for values that nobody thought of a fact about the one sample.

    Raises:
        Unusable: In place of any such exception.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError) as error:
        raise Unusable(Reason.BAD_SHAPE, f"{where}: cannot be converted: {error}"[:300]) from error


def original_px(sides: Any) -> tuple[int, int] | None:
    """Return the two sides of an image as a foreign layout tells them; None where they can be none."""
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    good = all(isinstance(side, int | float) and 1 <= side <= _MAX_SIDE_PX for side in sides)  # NaN is not
    return (int(sides[0]), int(sides[1])) if good else None


# Images


def require_image_size(shape: Sequence[int], num_channels: int) -> None:
    """Refuse what is too large to be a posterior, before memory is taken for it.

    Raises:
        Unusable: If the shape has more numbers than the largest canvas.
    """
    if math.prod(shape) > 2 * num_channels * _MAX_CELLS:
        detail = f"expected latents of {_MAX_CELLS:,} cells at most, found {tuple(shape)!s:.100}"
        raise Unusable(Reason.BAD_SHAPE, detail)


def posterior(array: Array, num_channels: int) -> Array:
    """Return mean and standard deviation (2, C, h, w) from (2C, h, w) or (2, C, h, w), with or without a batch of one.

    Raises:
        Unusable: If it has another shape.
    """
    require_image_size(array.shape, num_channels)
    shape = _unbatched(array)
    if len(shape) == 3 and shape[0] == 2 * num_channels:
        return _cells(array.reshape(2, num_channels, *shape[1:]))
    if len(shape) == 4 and shape[:2] == (2, num_channels):
        return _cells(array.reshape(shape))
    raise Unusable(
        Reason.BAD_SHAPE,
        f"expected mean and standard deviation ({2 * num_channels}, h, w) of {num_channels} channels, found "
        f"{array.shape}",
    )


def moments(array: Array, num_channels: int, factor: float) -> Array:
    """Return `posterior`, or, of latents (C, h, w) that were drawn and scaled, one without deviation.

    Args:
        factor: What drawn latents were multiplied by; the posterior is unscaled.

    Raises:
        Unusable: If the shape is neither's.
    """
    require_image_size(array.shape, num_channels)
    shape = _unbatched(array)
    if len(shape) != 3 or shape[0] != num_channels:
        return posterior(array, num_channels)
    mean = _cells(array.reshape(shape)).astype(np.float32) / np.float32(factor)
    return np.stack([mean, np.zeros_like(mean)])


def _unbatched(array: Array) -> tuple[int, ...]:
    return array.shape[1:] if array.ndim > 3 and array.shape[0] == 1 else array.shape


def _cells(array: Array) -> Array:
    height, width = array.shape[-2:]
    if array.dtype.kind != "f":
        raise Unusable(Reason.BAD_SHAPE, f"expected floating point numbers, found {array.dtype}")
    if not height or not width or height % 2 or width % 2:
        detail = f"expected an even number of latent cells on each side (the patch is 2), found {height} x {width}"
        raise Unusable(Reason.BAD_SHAPE, detail)
    return array


def stored_moments(values: Array) -> tuple[npt.NDArray[np.float16], Rounding]:
    """Return a posterior as fp16 and what that lost.

    Raises:
        Unusable: If a value is infinite, not a number, or beyond fp16.
    """
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    if not np.isfinite(stored).all():
        raise Unusable(Reason.NONFINITE_FEATURES, "a value is infinite, not a number, or beyond fp16")
    return stored, _lost(values, stored)


# Text


def require_text_size(shape: Sequence[int], width: int | None) -> None:
    """Refuse what is too large to be the features of a caption, before memory is taken for it.

    Raises:
        Unusable: If the shape has more tokens, or numbers, than any caption.
    """
    num_tokens = shape[-2] if len(shape) > 1 else 0
    if num_tokens > MAX_TOKENS or math.prod(shape) > MAX_TOKENS * (width or _MAX_WIDTH):
        detail = f"expected {MAX_TOKENS:,} tokens at most, found text features {tuple(shape)!s:.100}"
        raise Unusable(Reason.BAD_SHAPE, detail)


def require_mask_size(shape: Sequence[int]) -> None:
    """Refuse what is too large to be the mask of a caption, before memory is taken for it.

    Raises:
        Unusable: If it is for more tokens than any caption has.
    """
    if math.prod(shape) > MAX_TOKENS:
        raise Unusable(
            Reason.BAD_SHAPE, f"expected a mask of {MAX_TOKENS:,} tokens at most, found {tuple(shape)!s:.100}"
        )


def tokens(array: Array, mask: Array | None, width: int | None) -> Array:
    """Return the true tokens (n, D) of features (L, D), with or without a batch of one; `mask` is 1 on true tokens.

    Numpy has no bf16; uint16 is taken for its bits.

    Raises:
        Unusable: If the shapes do not fit each other or `width`, there are too many tokens, or none is left.
    """
    require_text_size(array.shape, width)
    rows = array[0] if array.ndim == 3 and len(array) == 1 else array  # (L, D)
    if rows.ndim != 2 or not rows.size or (width is not None and rows.shape[1] != width):
        raise Unusable(Reason.BAD_SHAPE, f"expected text features (tokens, {width or 'width'}), found {array.shape}")
    if rows.dtype.kind not in "fiu":
        raise Unusable(Reason.BAD_SHAPE, f"expected numbers, found {rows.dtype}")
    if rows.dtype == np.uint16:
        rows = widened(rows)
    if mask is None:
        return rows
    kept = np.asarray(mask).reshape(-1) != 0
    if len(kept) != len(rows):
        raise Unusable(Reason.BAD_SHAPE, f"expected a mask of {len(rows)} tokens, found {len(kept)}")
    if not kept.any():
        raise Unusable(Reason.BAD_SHAPE, "the attention mask leaves no token")
    true: Array = rows[kept]
    return true


def stored_tokens(values: Array) -> tuple[npt.NDArray[np.uint16], Rounding]:
    """Return text features as bits of bf16, rounded to nearest, ties to even, and what that lost.

    Raises:
        Unusable: If a value is infinite or not a number.
    """
    import torch

    with np.errstate(over="ignore"):
        wide = np.array(values, np.float32, order="C")
    narrow = torch.from_numpy(wide).to(torch.bfloat16)  # (n, D)
    if not bool(narrow.isfinite().all()):
        raise Unusable(Reason.NONFINITE_FEATURES, "a value is infinite, not a number, or beyond bf16")
    bits: npt.NDArray[np.uint16] = narrow.view(torch.int16).numpy().view(np.uint16)
    return bits, _lost(values, narrow.float().numpy())


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return bits of bf16 as fp32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _lost(found: Array, stored: Array) -> Rounding:
    differs = found != stored  # compared in the wider of the two types
    if not differs.any():
        return Rounding()
    error = np.abs(found[differs].astype(np.float64) - stored[differs].astype(np.float64))
    return Rounding(1, int(differs.sum()), float(error.max()))
