"""A text set's codec as it is stored: its calibration beside the shards, its tensors one after another in a member."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixart_data.codecs import Codec, from_manifest
from pixart_data.errors import DataError
from pixart_data.shards import DTYPES, Manifest
from pixart_data.storage import read_bytes


def read_codec(root: Path, manifest: Manifest) -> Codec:
    """Return the codec of a text set, ready to decode.

    Raises:
        DataError: If its calibration is missing or damaged.
    """
    calibration = manifest.codec.get("calibration")
    if not calibration:
        return from_manifest(manifest.codec, manifest.model["width"], {})
    import safetensors.torch

    path = root / calibration["path"]
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; copy it again: without it nothing in {root} can be decoded") from None
    if hashlib.sha256(data).hexdigest() != calibration["sha256"]:
        raise DataError(f"{path}: damaged, or of another set; copy it again: it decodes all of {root}")
    return from_manifest(manifest.codec, manifest.model["width"], safetensors.torch.load(data))


def split(codec: Codec, data: npt.NDArray[np.uint8], num_tokens: int) -> list[npt.NDArray[Any]]:
    """Return the tensors of a member, views of its bytes; BF16 as its bits.

    Raises:
        ValueError: If no caption of so many tokens has so many bytes.
    """
    arrays, end = [], 0
    for part in codec.parts(num_tokens, len(data)):
        start, end = end, end + part.size_bytes
        arrays.append(data[start:end].view(DTYPES[part.dtype]).reshape(part.shape))
    return arrays
