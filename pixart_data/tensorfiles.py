"""Caches of `.pt` files, one for each sample, as scripts around diffusers write them.

A file holds a tensor, or a dict of tensors under the names that diffusers' pipelines use. Latents and prompt embeddings
may be in one file or in files of the same name in two folders. Nothing but tensors and plain values is ever unpickled.
"""

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_data.arrivals import (
    Array,
    Arrival,
    Portion,
    Unusable,
    conversion,
    moments,
    original_px,
    require_image_size,
    require_mask_size,
    require_text_size,
    tokens,
)
from pixart_data.errors import ConfigError
from pixart_data.records import Reason
from pixart_data.references import read_file
from pixart_data.stores import unreadable
from pixart_data.threads import ahead
from pixart_data.units import encode_name, encode_path, storable

if TYPE_CHECKING:
    from torch import Tensor

EXTENSION = ".pt"
IMAGE_NAMES = ("moments", "latents", "latent")
TEXT_NAMES = ("prompt_embeds", "prompt_embed", "encoder_hidden_states")
MASK_NAMES = ("prompt_attention_mask", "prompt_embeds_mask", "attention_mask")
CAPTION_NAMES = ("prompt", "caption", "text")
SIZE_NAME = "original_size"

_DAMAGED = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError,
    OSError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What torch raises for damaged files."""
_THREADS, _AHEAD = 4, 8


@dataclass(frozen=True)
class TensorFiles:
    """A folder of `.pt` files.

    Attributes:
        image_folder: Of the latents, below `root`; empty: `root` itself.
        text_folder: Likewise, of the prompt embeddings.
        factor: What latents that are no posteriors were multiplied by.
    """

    root: Path
    image_folder: str
    text_folder: str
    num_channels: int
    text_width: int | None
    factor: float
    rows_per_unit: int

    def portions(self) -> list[Portion]:
        """Cut the names of the files, of both folders together, into units of work.

        Raises:
            ConfigError: If a folder is missing or there are no files in it.
            DataError: If a folder cannot be listed.
        """
        sizes: dict[str, list[Any]] = {}
        for kind, folder in (("image", self.image_folder), ("text", self.text_folder)):
            place = self.root / folder
            found = _files(place)
            if not found:
                raise ConfigError(
                    f"{kind}.folder: expected {EXTENSION} files in {place}, found none; name the folder below "
                    f"{self.root} with --set {kind}.folder=FOLDER"
                )
            for name, size in found.items():
                sizes.setdefault(name, []).append([kind, size])
        names, portions = sorted(sizes), []
        for number, start in enumerate(range(0, len(names), self.rows_per_unit)):
            some = tuple(names[start : start + self.rows_per_unit])
            fingerprint = hashlib.sha256(json.dumps([[name, sizes[name]] for name in some]).encode()).hexdigest()
            portions.append(Portion(f"{encode_name(self.root.name)}-{number:05d}", fingerprint, len(some), some))
        return portions

    def images(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the posteriors of a portion.

        Raises:
            DataError: If the storage fails.
        """
        yield from ahead(self._image, portion.content, _THREADS, _AHEAD)

    def texts(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the text features of a portion.

        Raises:
            DataError: If the storage fails.
        """
        yield from ahead(self._text, portion.content, _THREADS, _AHEAD)

    def _key(self, name: str) -> str:
        return f"{encode_name(self.root.name)}/{encode_path(name.removesuffix(EXTENSION))}"

    def _image(self, name: str) -> Arrival:
        try:
            held = _load(self.root / self.image_folder / name)
            with conversion(name):
                found = _one(held, IMAGE_NAMES, name)
                require_image_size(found.shape, self.num_channels)
                values, sides_px = moments(_array(found), self.num_channels, self.factor), _size(held)
        except Unusable as why:
            return Arrival(self._key(name), error=why.reason, detail=storable(why.detail))
        return Arrival(self._key(name), values, original_px=sides_px)

    def _text(self, name: str) -> Arrival:
        try:
            held = _load(self.root / self.text_folder / name)
            with conversion(name):
                found = _one(held, TEXT_NAMES, name)
                require_text_size(found.shape, self.text_width)
                values = tokens(_array(found), _mask(held), self.text_width)
        except Unusable as why:
            return Arrival(self._key(name), error=why.reason, detail=storable(why.detail))
        return Arrival(self._key(name), values, _caption(held), num_padded=found.shape[-2])


def _files(root: Path) -> dict[str, int]:
    """Return the files below a folder by their paths in it, with their sizes."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise unreadable(str(root), error) from error

    found = {}
    for folder, _, names in os.walk(root, onerror=fail, followlinks=True):
        for name in names:
            if name.endswith(EXTENSION) and not name.startswith("."):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path.stat().st_size if path.exists() else 0
    return found


def _load(path: Path) -> Any:
    import torch

    data = read_file(path)
    try:
        _require_stored(data)
        return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        line = " ".join(str(error).split())[:200]
        raise Unusable(Reason.DAMAGED_FILE, f"{path}: not tensors that can be read: {line}") from error


def _require_stored(data: bytes) -> None:
    """Refuse an archive that holds more than it is large: torch stores tensors as they are, but would inflate others.

    Raises:
        ValueError: If it does.
    """
    if zipfile.is_zipfile(BytesIO(data)):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            size_bytes = sum(member.file_size for member in archive.infolist())
        if size_bytes > len(data):
            raise ValueError(f"expected tensors stored as they are, found {size_bytes:,} bytes in {len(data):,}")


def _one(held: Any, names: tuple[str, ...], file: str) -> "Tensor":
    """Return the tensor under one of the names, or the file's only one."""
    import torch

    found = next((held[name] for name in names if name in held), None) if isinstance(held, Mapping) else held
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        what = ", ".join(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
        raise Unusable(
            Reason.BAD_SHAPE, f"{file}: expected a tensor or one under {', '.join(names)}, found {what:.200}"
        )
    return found


def _array(tensor: "Tensor") -> Array:
    """Return a tensor as an array; bf16 as fp32, exactly."""
    import torch

    if tensor.layout != torch.strided:
        raise Unusable(Reason.BAD_SHAPE, f"expected a dense tensor, found {tensor.layout}")
    known = tensor.dtype in (torch.float16, torch.float32, torch.float64)
    array: Array = (tensor if known else tensor.float()).detach().numpy()
    return array


def _mask(held: Any) -> Array | None:
    import torch

    found = _named(held, MASK_NAMES)
    if not isinstance(found, torch.Tensor):
        return None
    require_mask_size(found.shape)
    return _array(found.float())


def _caption(held: Any) -> str | None:
    found = _named(held, CAPTION_NAMES)
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return storable(found).strip() if isinstance(found, str) else None


def _size(held: Any) -> tuple[int, int] | None:
    import torch

    found = _named(held, (SIZE_NAME,))
    if isinstance(found, torch.Tensor):
        found = found.flatten().tolist() if found.numel() == 2 else None
    return original_px(found)


def _named(held: Any, names: tuple[str, ...]) -> Any:
    return next((held[name] for name in names if name in held), None) if isinstance(held, Mapping) else None
