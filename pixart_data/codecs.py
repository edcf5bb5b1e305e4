"""Text codecs: how the features of a caption, bf16 (n, D), become the tensors of a member, and back.

    bf16          t5       BF16  (n, D)            as they are
    bf16-packed   t5_low   U8    (n, D)            sign and mantissa
                  t5_high  U8    (n, ceil(D / 2))  two exponents of 4 bits, the even channel in the lower ones
                  t5_rare  U16   (k, 3)            token, channel and bits of values with another exponent
    int8          t5       I8    (n, D)            x = t5 * t5_scale[token, channel // group] * channel_scale[channel]
                  t5_scale BF16  (n, D / group)

`bf16-packed` gives every bit back: few exponents occur in features, and the set's table holds the 15 commonest. `int8`
divides each channel by its rms first: T5 has channels that are many times larger than the rest, and a scale for a
token, or for a group of channels, that has to span them leaves nothing of their neighbours. Tables are calibrated once
for a set. Encoding and decoding run where the tensors are; importing this loads no torch.

Legend: n tokens of a caption, N of a batch, D text width, K rare values, G = D / group.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from pixart_data.errors import DataError
from pixart_data.fidelity import Measure, merge

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CODECS", "Codec", "Measure", "Part", "calibrate", "from_manifest", "merge"]

CODECS = ("bf16", "bf16-packed", "int8")

_ITEM_BYTES = {"BF16": 2, "U16": 2, "U8": 1, "I8": 1}
_LIMIT = 1 << 16  # of tokens and of channels: rare values are numbered in 16 bits
_GROUP = 128  # channels with a scale of their own in each token
_NUM_EXPONENTS = 15
_RARE = 15  # the code of all other exponents
_RARE_BYTES = 6
_CHUNK_VALUES = 1 << 19  # decoded at once on a CPU: what lies between the passes stays in its cache


@dataclass(frozen=True)
class Part:
    """One tensor of a member, of a safetensors type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Codec(ABC):
    """A way to store text features; made by `calibrate` and `from_manifest`.

    Attributes:
        name: One of `CODECS`.
        tensors: Name and safetensors type of the tensors of a member, in the order of their bytes.
        width: D, the channels of a token.
        table: What the codec was calibrated to; None is enough for `parts` and `size_bytes`.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[tuple[str, str], ...]]
    table_name: ClassVar[str] = ""

    width: int
    table: npt.NDArray[Any] | None = None
    # What follows from the table, on the devices where it was needed.
    _placed: dict[tuple[str, "torch.device"], "Tensor"] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.width < _LIMIT:
            raise ValueError(f"codec {self.name}: expected 1 to {_LIMIT - 1} channels, got {self.width}")

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_placed": {}}  # whoever unpickles it may lack the device

    @abstractmethod
    def shapes(self, num_tokens: int, num_rare: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of `tensors`; `num_rare` counts only where some values are stored apart."""

    def size_bytes(self, num_tokens: int) -> int | None:
        """Return the bytes of a caption; None where they depend on its values."""
        return sum(part.size_bytes for part in self._parts(num_tokens, 0))

    def parts(self, num_tokens: int, size_bytes: int) -> tuple[Part, ...]:
        """Return the tensors of a member, in the order of their bytes.

        Raises:
            ValueError: If no caption of so many tokens has so many bytes.
        """
        least = sum(part.size_bytes for part in self._parts(num_tokens, 0))
        num_rare, rest = divmod(size_bytes - least, _RARE_BYTES)
        fixed = self.size_bytes(num_tokens) is not None
        if rest or not 0 <= num_rare <= (0 if fixed else num_tokens * self.width):
            expected = f"{least:,} bytes" if fixed else f"{least:,} bytes and {_RARE_BYTES} for each rare value"
            raise ValueError(f"codec {self.name}: expected {expected} for {num_tokens} tokens, found {size_bytes:,}")
        return self._parts(num_tokens, num_rare)

    def _parts(self, num_tokens: int, num_rare: int) -> tuple[Part, ...]:
        shapes = self.shapes(num_tokens, num_rare)
        return tuple(Part(*tensor, shape) for tensor, shape in zip(self.tensors, shapes, strict=True))

    def calibration(self) -> dict[str, "Tensor"]:
        """Return what a set stores beside its shards so that it can be decoded; empty if nothing is needed."""
        import torch

        return {self.table_name: torch.from_numpy(self._known().copy())} if self.table_name else {}

    def encode(self, features: "Tensor") -> list[npt.NDArray[Any]]:
        """Encode a caption.

        Args:
            features: bf16 (n, D), finite unless the codec is lossless; on any device.

        Returns:
            The arrays of `tensors`; BF16 as its bits, in uint16.

        Raises:
            ValueError: If the features are none of this codec's.
        """
        import torch

        if features.dtype != torch.bfloat16 or features.ndim != 2 or features.shape[1] != self.width:
            found = f"{features.dtype} {tuple(features.shape)}"
            raise ValueError(f"codec {self.name}: expected torch.bfloat16 (n, {self.width}), got {found}")
        if len(features) >= _LIMIT:
            raise ValueError(f"codec {self.name}: expected under {_LIMIT} tokens, got {len(features)}")
        return self._encode(features)

    @abstractmethod
    def _encode(self, features: "Tensor") -> list[npt.NDArray[Any]]: ...

    @abstractmethod
    def decode(self, parts: Sequence["Tensor"], starts: "Tensor | None" = None) -> "Tensor":
        """Decode the captions of a batch where they are, on any device, without waiting for it.

        Args:
            parts: The tensors of the captions, each concatenated over the captions: N tokens in all. U16 may come as
                its bits, in int16.
            starts: int64 (K,), of each rare value the first token of its caption; None if the batch is one caption.

        Returns:
            bf16 (N, D); of codec bf16 the very tensor that came.
        """

    def decode_arrays(self, arrays: Sequence[npt.NDArray[Any]]) -> "Tensor":
        """Decode what `encode` returned, on the CPU: bf16 (n, D)."""
        import torch

        tensors = [torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a) for a in arrays]
        types = [dtype for _, dtype in self.tensors]
        return self.decode([t.view(torch.bfloat16) if d == "BF16" else t for d, t in zip(types, tensors, strict=True)])

    def _tables(self) -> dict[str, npt.NDArray[Any]]:
        return {self.table_name: self._known()}

    def _known(self) -> npt.NDArray[Any]:
        if self.table is None:
            raise ValueError(f"codec {self.name}: made without its calibration, which only parts() can do without")
        return self.table

    def _table(self, name: str, device: "torch.device") -> "Tensor":
        if (name, device) not in self._placed:
            import torch

            self._placed[name, device] = torch.from_numpy(self._tables()[name]).to(device)
        return self._placed[name, device]


@dataclass(frozen=True, eq=False)
class _Plain(Codec):
    name = "bf16"
    tensors = (("t5", "BF16"),)

    def shapes(self, num_tokens: int, num_rare: int) -> tuple[tuple[int, ...], ...]:
        return ((num_tokens, self.width),)

    def _encode(self, features: "Tensor") -> list[npt.NDArray[Any]]:
        return [_bits(features)]

    def decode(self, parts: Sequence["Tensor"], starts: "Tensor | None" = None) -> "Tensor":
        return parts[0]


@dataclass(frozen=True, eq=False)
class _Packed(Codec):
    """The table is uint8 (15,), biased exponents; a code is a position in it."""

    name = "bf16-packed"
    tensors = (("t5_low", "U8"), ("t5_high", "U8"), ("t5_rare", "U16"))
    table_name = "exponents"

    def shapes(self, num_tokens: int, num_rare: int) -> tuple[tuple[int, ...], ...]:
        return ((num_tokens, self.width), (num_tokens, (self.width + 1) // 2), (num_rare, 3))

    def size_bytes(self, num_tokens: int) -> int | None:
        return None

    def _tables(self) -> dict[str, npt.NDArray[Any]]:
        codes = np.full(256, _RARE, np.uint8)
        codes[self._known()] = np.arange(_NUM_EXPONENTS)
        placed = np.append(self._known(), 0).astype(np.int16) << 7  # where bf16 has its exponent; rare ones come later
        byte = np.arange(256)
        pairs = np.stack([placed[byte & 15], placed[byte >> 4]], axis=1)  # (256, 2): of the even and the odd channel
        return {"codes": codes, "pairs": pairs.view(np.int32).ravel()}

    def _encode(self, features: "Tensor") -> list[npt.NDArray[Any]]:
        import torch

        bits = features.view(torch.int16)  # (n, D)
        exponents = (bits >> 7).bitwise_and_(0xFF)
        codes = self._table("codes", bits.device).index_select(0, exponents.flatten().int()).view(bits.shape)  # (n, D)
        low = ((bits >> 8 & 0x80) | (bits & 0x7F)).to(torch.uint8)
        tokens, channels = (codes == _RARE).nonzero(as_tuple=True)
        rare = torch.stack([tokens, channels, bits[tokens, channels].long()], dim=1).to(torch.int16)  # (K, 3)
        pairs = torch.nn.functional.pad(codes, (0, self.width % 2)).view(torch.int16)  # (n, ceil(D / 2))
        high = (pairs >> 4 | pairs).to(torch.uint8)
        return [low.cpu().numpy(), high.cpu().numpy(), rare.cpu().numpy().view(np.uint16)]

    def decode(self, parts: Sequence["Tensor"], starts: "Tensor | None" = None) -> "Tensor":
        import torch

        low, high, rare = parts
        pairs = self._table("pairs", low.device)
        bits = torch.empty(low.shape, dtype=torch.int16, device=low.device)  # (N, D)
        for rows in _chunks(low):
            # Read as signed, a byte widens so that its sign is where bf16 has it, and 0x807F drops the copies between.
            outer = low[rows].view(torch.int8).to(torch.int16).bitwise_and_(0x807F - (1 << 16))
            inner = pairs.index_select(0, high[rows].flatten().int()).view(torch.int16)
            torch.bitwise_or(outer, inner.view(len(outer), -1)[:, : self.width], out=bits[rows])
        if len(rare):
            rare = rare.view(torch.int16)  # (K, 3); a GPU computes with signed types only
            tokens, channels = (rare[:, :2].long() & 0xFFFF).unbind(1)
            bits.index_put_((tokens if starts is None else tokens + starts, channels), rare[:, 2])
        return bits.view(torch.bfloat16)


@dataclass(frozen=True, eq=False)
class _Int8(Codec):
    """The table is fp32 (D,), the rms of each channel; `group` channels share a scale in a token."""

    name = "int8"
    tensors = (("t5", "I8"), ("t5_scale", "BF16"))
    table_name = "channel_scale"

    group: int = _GROUP

    def shapes(self, num_tokens: int, num_rare: int) -> tuple[tuple[int, ...], ...]:
        return ((num_tokens, self.width), (num_tokens, self.width // self.group))

    def _grouped(self, num_tokens: int) -> tuple[int, int, int]:
        return (num_tokens, self.width // self.group, self.group)

    def _encode(self, features: "Tensor") -> list[npt.NDArray[Any]]:
        import torch

        y = features.float() / self._table("channel_scale", features.device)
        y = y.reshape(self._grouped(len(y)))  # (n, G, group)
        top = y.abs().amax(dim=2)  # (n, G)
        if not bool(top.isfinite().all()):
            raise ValueError("codec int8: expected finite features, found others; reject the caption")
        # Rounded up to bf16, so that the largest value of a group is not cut; never zero, nor so small that a device
        # may take it for zero.
        smallest = torch.finfo(torch.bfloat16).tiny
        scale = ((top / 127).view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32).clamp_(min=smallest)
        values = (y / scale.unsqueeze(2)).round_().to(torch.int8).flatten(1)  # (n, D)
        return [values.cpu().numpy(), _bits(scale.bfloat16())]

    def decode(self, parts: Sequence["Tensor"], starts: "Tensor | None" = None) -> "Tensor":
        import torch

        values, scale = parts
        channel_scale = self._table("channel_scale", values.device)
        x = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)  # (N, D)
        for rows in _chunks(values):
            # In this order the first product is exact, so that devices cannot disagree.
            part = values[rows]
            grouped = part.reshape(self._grouped(len(part))) * scale[rows].float().unsqueeze(2)  # fp32 (., G, group)
            x[rows] = grouped.flatten(1).mul_(channel_scale)
        return x


def calibrate(name: str, features: Sequence["Tensor"]) -> Codec:
    """Make a codec for a set from the features of its first captions; the same ones give the same codec.

    Args:
        features: bf16 (n, D) of each caption, finite for `int8`; some 10,000 tokens in all are plenty.

    Raises:
        ValueError: If there is no caption, or the features cannot be calibrated on.
    """
    import torch

    if not features:
        raise ValueError(f"codec {name}: expected captions to calibrate on, got none")
    width = features[0].shape[1]
    if name == _Plain.name:
        return _Plain(width)
    if name == _Packed.name:
        counts = np.zeros(256, np.int64)
        for caption in features:
            bits = _bits(caption).astype(np.int64)
            counts += np.bincount((bits >> 7 & 0xFF).ravel(), minlength=256)
        distances = np.abs(np.arange(256) - counts.argmax())  # of those not seen, the near ones are likelier
        commonest = np.lexsort((distances, -counts))[:_NUM_EXPONENTS]
        return _Packed(width, np.sort(commonest).astype(np.uint8))
    if name != _Int8.name:
        raise ValueError(f"codec: expected one of {', '.join(CODECS)}, got {name}")
    squares, num_tokens = np.zeros(width), 0
    for caption in features:
        # numpy adds row to row; the order of torch's sums depends on its threads.
        squares += np.square(caption.cpu().to(torch.float64).numpy()).sum(axis=0)
        num_tokens += len(caption)
    scale = np.sqrt(squares / max(num_tokens, 1)).astype(np.float32)
    if not np.isfinite(scale).all():
        raise ValueError("codec int8: expected finite features to calibrate on, found others")
    smallest = np.finfo(np.float32).tiny
    return _Int8(width, np.where(scale < smallest, np.float32(1), scale), group=_group(width))


def from_manifest(codec: Mapping[str, Any], width: int, calibration: Mapping[str, "Tensor"]) -> Codec:
    """Make the codec of a set.

    Args:
        codec: `Manifest.codec`.
        calibration: The tensors of the file that it names. Without any, the codec knows its `parts` only.

    Raises:
        DataError: If the codec is unknown, or was calibrated for features of another width.
    """
    name, group = codec.get("name", _Plain.name), codec.get("group", _group(width))
    where = codec.get("calibration", {}).get("path", "codec.safetensors")
    if name == _Plain.name:
        return _Plain(width)
    if name == _Packed.name:
        exponents = _tensor(calibration, where, "exponents", np.uint8, _NUM_EXPONENTS)
        if exponents is not None and len(np.unique(exponents)) < _NUM_EXPONENTS:
            raise DataError(f"{where}: expected {_NUM_EXPONENTS} different exponents; copy the file again")
        return _Packed(width, exponents)
    if name != _Int8.name:
        known = ", ".join(CODECS)
        raise DataError(f"manifest.json: codec.name: expected one of {known}, found {name}; update the toolkit")
    if not isinstance(group, int) or group < 1 or width % group:
        found = f"expected a divisor of the width {width}, found {group}"
        raise DataError(f"manifest.json: codec.group: {found}; copy the file again, or extract the set again")
    scale = _tensor(calibration, where, "channel_scale", np.float32, width)
    if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
        raise DataError(f"{where}: expected a channel_scale above zero for every channel; copy the file again")
    return _Int8(width, scale, group=group)


def _group(width: int) -> int:
    return width if width % _GROUP else _GROUP


def _bits(features: "Tensor") -> npt.NDArray[np.uint16]:
    import torch

    bits: npt.NDArray[np.int16] = features.contiguous().view(torch.int16).cpu().numpy()
    return bits.view(np.uint16)


def _chunks(tokens: "Tensor") -> Iterator[slice]:
    """Cut the rows of (N, D) for passes one after another; a GPU takes them in one."""
    num_rows = max(1, _CHUNK_VALUES // tokens.shape[1] if tokens.device.type == "cpu" else len(tokens))
    for start in range(0, len(tokens), num_rows):
        yield slice(start, start + num_rows)


def _tensor(
    calibration: Mapping[str, "Tensor"], where: str, name: str, dtype: npt.DTypeLike, length: int
) -> npt.NDArray[Any] | None:
    if not calibration:
        return None
    array: npt.NDArray[Any] = calibration[name].cpu().numpy() if name in calibration else np.empty(0)
    if array.dtype != dtype or array.shape != (length,):
        expected, found = f"{name} {np.dtype(dtype)} ({length},)", f"{', '.join(sorted(calibration))} {array.shape}"
        raise DataError(f"{where}: expected {expected}, found {found}; it belongs to another set, or is damaged")
    return array
