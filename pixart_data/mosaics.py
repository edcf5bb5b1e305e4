"""Features in MDS shards: latents as micro_diffusion stores them, posteriors as this toolkit exports them.

micro_diffusion's rows are `caption` (text), `caption_latents` (bytes: fp16 (77, 1024) of CLIP, padding included, no
mask) and `latents_256`, `latents_512` (bytes: fp16 (4, side, side), drawn once from the posterior and scaled).
Source: SonyResearch/micro_diffusion, datasets/prepare/*/precompute.py and datasets/latents_loader.py.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixart_data.arrivals import (
    CELL_PX,
    Array,
    Arrival,
    Portion,
    Unusable,
    conversion,
    is_key,
    moments,
    original_px,
    tokens,
)
from pixart_data.errors import ConfigError
from pixart_data.mds import Mosaic, read_index, read_samples
from pixart_data.records import Reason
from pixart_data.units import encode_name, storable

COLUMNS = {
    "key": "str",
    "caption": "str",
    "moments": "ndarray:float16",
    "t5": "ndarray:uint16",
    "original_height_px": "int",
    "original_width_px": "int",
}
"""What exports hold: `moments` (2, C, h, w); `t5` (n, D) as bits of bf16, which numpy does not have."""

IMAGE_COLUMNS = ("moments", "latents_{}", "latents")
TEXT_COLUMNS = ("t5", "caption_latents", "prompt_embeds")
_MASK = "attention_mask"
_SIZES = (("original_height_px", "original_width_px"), ("height", "width"))


@dataclass(frozen=True)
class Mosaics:
    """A folder of MDS shards with a column of latents or posteriors and one of text features.

    A column of bare bytes is taken for an array of `bytes_dtype`: square latents of `resolution_px`, tokens of
    `text_width`.

    Attributes:
        image_column: None: the one there is of `IMAGE_COLUMNS`, the resolution filled in.
        text_column: None: the one there is of `TEXT_COLUMNS`.
        factor: What latents that are no posteriors were multiplied by.
    """

    root: Path
    image_column: str | None
    text_column: str | None
    caption_column: str
    resolution_px: int
    num_channels: int
    text_width: int | None
    factor: float
    bytes_dtype: str

    def portions(self) -> list[Portion]:
        """Return a unit of work for each shard.

        Raises:
            ConfigError: If there is no column of features, or bytes of an unknown width.
            DataError: If there is no index.
        """
        name = encode_name(self.root.name)
        portions = []
        for number, shard in enumerate(read_index(self.root)):
            text = self._column("text", shard)
            self._column("image", shard)
            if self.text_width is None and shard.encodings[shard.names.index(text)] == "bytes":
                raise ConfigError(
                    f"text.width: required for column {text} of {self.root}, which is bare bytes, and missing; pass "
                    "--set text.width=1024 for the CLIP features of micro_diffusion, 4096 for T5-XXL"
                )
            facts = [str(shard.path.relative_to(self.root)), shard.size_bytes, shard.num_samples, dict(shard.hashes)]
            fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
            portions.append(Portion(f"{name}-{number:05d}", fingerprint, shard.num_samples, (number, shard)))
        return portions

    def images(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the posteriors of a shard.

        Raises:
            JobError: If the storage fails.
        """
        column = self._column("image", portion.content[1])
        for key, sample in self._samples(portion, [column, *(name for pair in _SIZES for name in pair)]):
            try:
                with conversion(f"column {column}"):
                    values = self._moments(_value(sample, column))
            except Unusable as why:
                yield Arrival(key, error=why.reason, detail=storable(why.detail))
            else:
                yield Arrival(key, values, original_px=_original(sample))

    def texts(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the text features of a shard.

        Raises:
            JobError: If the storage fails.
        """
        column = self._column("text", portion.content[1])
        for key, sample in self._samples(portion, [column, self.caption_column, _MASK]):
            try:
                with conversion(f"column {column}"):
                    array = self._tokens(_value(sample, column))
                    mask = None if isinstance(sample, Unusable) else sample.get(_MASK)
                    values = tokens(array, mask, self.text_width)
            except Unusable as why:
                yield Arrival(key, error=why.reason, detail=storable(why.detail))
            else:
                caption = None if isinstance(sample, Unusable) else sample.get(self.caption_column)
                caption = caption if isinstance(caption, str) else None
                yield Arrival(key, values, caption, num_padded=array.shape[-2])

    def _column(self, kind: str, shard: Mosaic) -> str:
        """Return the column of a kind of features, "image" or "text"."""
        given = self.image_column if kind == "image" else self.text_column
        known = [name.format(self.resolution_px) for name in (IMAGE_COLUMNS if kind == "image" else TEXT_COLUMNS)]
        for name in known if given is None else [given]:
            if name in shard.names:
                return name
        raise ConfigError(
            f"{kind}.column: expected {given or ' or '.join(known)} in {shard.path}, found {', '.join(shard.names)}; "
            f"name one with --set {kind}.column=COLUMN"
        )

    def _samples(self, portion: Portion, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
        """Yield key and columns of each sample; of a lost shard, the reason for each."""
        number, shard = portion.content
        source = f"{encode_name(self.root.name)}/{number:05d}"
        samples: Iterator[dict[str, Any] | Unusable]
        samples = read_samples(shard, ["key", *columns])
        row = 0
        try:
            for row, sample in enumerate(samples, 1):
                key = None if isinstance(sample, Unusable) else sample.get("key")
                yield key if is_key(key) else f"{source}/{row - 1:06d}", sample
        except Unusable as why:
            for lost in range(row, shard.num_samples):
                yield f"{source}/{lost:06d}", why

    def _moments(self, value: Any) -> Array:
        if not isinstance(value, bytes):
            return moments(value, self.num_channels, self.factor)
        cells = self.resolution_px // CELL_PX
        array = _from_bytes(value, self.bytes_dtype, self.num_channels * cells * cells)
        return moments(array.reshape(-1, cells, cells), self.num_channels, self.factor)

    def _tokens(self, value: Any) -> Array:
        if not isinstance(value, bytes):
            return value if isinstance(value, np.ndarray) else np.empty(0)
        width = self.text_width or 1
        return _from_bytes(value, self.bytes_dtype, width).reshape(-1, width)


def _value(sample: dict[str, Any] | Unusable, column: str) -> Any:
    if isinstance(sample, Unusable):
        raise sample
    return sample[column]


def _original(sample: dict[str, Any] | Unusable) -> tuple[int, int] | None:
    if isinstance(sample, Unusable):
        return None
    return next(filter(None, (original_px([sample.get(name) for name in names]) for names in _SIZES)), None)


def _from_bytes(data: bytes, dtype: str, multiple: int) -> Array:
    size_bytes = multiple * np.dtype(dtype).itemsize
    if not data or len(data) % size_bytes:
        detail = f"expected a multiple of {size_bytes} bytes ({multiple} numbers of {dtype}), found {len(data)}"
        raise Unusable(Reason.BAD_SHAPE, detail)
    return np.frombuffer(data, dtype)
