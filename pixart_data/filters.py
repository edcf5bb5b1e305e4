"""What is measured of an image and its raw caption, and what the filters of a job say of the measurements.

Measuring decodes the image, judging reads numbers: with other thresholds nothing is decoded again.
"""

import functools
import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pixart_data.errors import ConfigError
from pixart_data.records import Reason
from pixart_data.sections import Filters

if TYPE_CHECKING:
    from PIL import Image

    from pixart_data.images import Decoded

MEASURED_SIDE_PX = 512
"""Sharpness and hash are those of the picture shrunk to this longer side; a smaller one stays as it is."""
MIN_CONTRAST = 2.0
"""Standard deviation of 32 x 32 grey levels, of 255, under which the perceptual hash would be that of the noise."""

KEPT, UNREADABLE = 0, 1
_REASONS = (
    Reason.TOO_SMALL,
    Reason.EXTREME_ASPECT,
    Reason.BLURRED,
    Reason.WATERMARK,
    Reason.OTHER_LANGUAGE,
    Reason.DUPLICATE,
    Reason.NEAR_DUPLICATE,
)
CODES = {reason: code for code, reason in enumerate(_REASONS, start=2)}
"""The verdict on a sample as a small number, for there are millions: `KEPT`, `UNREADABLE`, or that of a reason."""
JUDGED = ("width_px", "height_px", "sharpness", "watermark", "language", "language_probability", "error")
"""The columns that `judge` reads."""

_HASH_SIDE_PX = 32


@dataclass(frozen=True)
class Measures:
    """What is measured of the pixels, as `records.MEASURES` has it."""

    width_px: int
    height_px: int
    sharpness: float
    phash: int | None


def measuring() -> dict[str, str]:
    """Return what decides measurements besides the source: they are not the same with other versions."""
    return {"version": "1", **{name: version(name) for name in ("imagehash", "py3langid")}}


def measure(decoded: "Decoded") -> Measures:
    """Measure a decoded image, which may have been shrunk while decoding, if both sides kept `MEASURED_SIDE_PX`."""
    import imagehash
    from PIL import Image

    grey = decoded.image.convert("L")
    grey.thumbnail((MEASURED_SIDE_PX, MEASURED_SIDE_PX), Image.Resampling.BICUBIC)
    small = grey.resize((_HASH_SIDE_PX, _HASH_SIDE_PX), Image.Resampling.LANCZOS)
    phash = None
    if np.asarray(small).std() >= MIN_CONTRAST:
        phash = int.from_bytes(np.packbits(imagehash.phash(small).hash).tobytes(), "big")
    return Measures(decoded.width_px, decoded.height_px, _sharpness(grey), phash)


def _sharpness(grey: "Image.Image") -> float:
    """Return the variance of the Laplacian (Pech-Pacheco et al. 2000); edges are repeated, so that strips have one."""
    pixels = np.pad(np.asarray(grey, dtype=np.int16), 1, mode="edge")
    laplacian = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * pixels[1:-1, 1:-1]
    return float(laplacian.var())


def content_digest(data: bytes) -> bytes:
    """Return the sha256 of compressed bytes."""
    return hashlib.sha256(data).digest()


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str | None) -> tuple[str | None, float | None]:
    """Return the likeliest language of a text and its probability; (None, None) for one without letters."""
    if text is None or not any(character.isalpha() for character in text):
        return None, None
    code, probability = _identifier().classify(text)
    return code, probability


def check_languages(codes: list[str]) -> None:
    """Raises ConfigError for a code that is not one of py3langid's languages."""
    known = set(_identifier().labels)
    for code in codes:
        if code not in known:
            found = ", ".join(sorted(known))
            raise ConfigError(f"filters.languages: expected codes such as 'en', found {code!r}; use some of: {found}")


def judge(table: pa.Table, filters: Filters) -> NDArray[np.int8]:
    """Apply all filters but those for duplicates; where several reject, the first in the order of `CODES` counts.

    Args:
        table: Columns `JUDGED` of measurements.

    Returns:
        (rows of the table,): `KEPT`, `UNREADABLE` or one of `CODES`.
    """
    column = {name: table[name].to_numpy(zero_copy_only=False) for name in JUDGED[:4]}  # floats; NaN where null
    shorter_px = np.minimum(column["width_px"], column["height_px"])
    longer_px = np.maximum(column["width_px"], column["height_px"])
    rejects: dict[Reason, NDArray[np.bool_]] = {}
    if filters.min_side_px is not None:
        rejects[Reason.TOO_SMALL] = shorter_px < filters.min_side_px
    if filters.max_aspect is not None:
        rejects[Reason.EXTREME_ASPECT] = longer_px > filters.max_aspect * shorter_px
    if filters.min_sharpness is not None:
        rejects[Reason.BLURRED] = column["sharpness"] < filters.min_sharpness
    if filters.max_watermark is not None:
        rejects[Reason.WATERMARK] = column["watermark"] > filters.max_watermark
    if filters.languages is not None:
        rejects[Reason.OTHER_LANGUAGE] = _in_other_language(table, filters.languages, filters.min_language_probability)
    codes = np.full(table.num_rows, KEPT, dtype=np.int8)
    for reason in reversed(rejects):
        codes[rejects[reason]] = CODES[reason]
    codes[pc.is_valid(table["error"]).to_numpy()] = UNREADABLE
    return codes


def _in_other_language(table: pa.Table, languages: list[str], min_probability: float) -> NDArray[np.bool_]:
    known = pc.or_(pc.is_null(table["language"]), pc.is_in(table["language"], pa.array(languages)))
    sure = pc.greater_equal(table["language_probability"], min_probability).fill_null(False)
    result: NDArray[np.bool_] = pc.and_(sure, pc.invert(known)).to_numpy(zero_copy_only=False)
    return result


def describe(reason: Reason, row: dict[str, Any], filters: Filters, earlier: str) -> str:
    """Say what a filter found and what it wants.

    Args:
        row: Of the measurements, columns `JUDGED`.
        earlier: For duplicates, the key of the sample that this one repeats.
    """
    size = f"{row['width_px']} x {row['height_px']} px"
    return {
        Reason.TOO_SMALL: f"{size}, a side under {filters.min_side_px}",
        Reason.EXTREME_ASPECT: f"{size}, more than {filters.max_aspect} : 1",
        Reason.BLURRED: f"sharpness {row['sharpness'] or 0:.1f}, under {filters.min_sharpness}",
        Reason.WATERMARK: f"probability {row['watermark'] or 0:.3f}, over {filters.max_watermark}",
        Reason.OTHER_LANGUAGE: f"{row['language']} with probability {row['language_probability'] or 0:.2f}",
        Reason.DUPLICATE: f"the bytes of {earlier}",
        Reason.NEAR_DUPLICATE: f"looks like {earlier}",
    }[reason]
