"""Pictures of a dataset, decoded from its latents, with what belongs to them: captions, sizes, tokens."""

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart_data.entries import Entries, checks
from pixart_data.errors import ConfigError, DataError
from pixart_data.sections import ImageFeatures
from pixart_data.shards import INDEX, FeatureSet
from pixart_data.surveys import index_rows, moments_of, read_members

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_RECORDS_AT_ONCE = 1 << 18
_PICTURES_A_LINE = 4  # of the log: on a CPU each may take half a minute
_SIDE_PX = 320
_QUALITY = 88
_IMAGE = ["key", "bucket", "original_height_px", "original_width_px", "image_ops"]
_TEXT = ["key", "caption", "num_tokens", "truncated"]


@dataclass
class Thumbnail:
    """A sample to look at.

    Attributes:
        row: Of the image index: key, bucket, original size and image_ops.
        texts: Rows of the text indexes, by name of the set: caption, num_tokens, truncated.
        jpeg: The decoded picture; empty where there is none.
        problem: Why there is none, if it is this sample's fault.
    """

    row: dict[str, Any]
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    jpeg: bytes = b""
    problem: str = ""

    @property
    def url(self) -> str:
        """The picture as a `data:` URL."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


class Decoder:
    """The VAE of an image set, loaded to look at its latents.

    Args:
        given: Another copy of the model than the one that the manifest names, and the folder in it.

    Raises:
        ConfigError: If it cannot be loaded or does not fit the latents.
    """

    def __init__(self, model: dict[str, Any], given: str | None, subfolder: str | None, device: str) -> None:
        section = ImageFeatures.model_validate(
            {
                "model": given or model["id"],
                "subfolder": subfolder if given else model.get("subfolder"),
                "revision": None if given else model.get("revision"),
                "device": device,
            }
        )
        try:
            from pixart_data.encoders import ImageEncoder

            self.vae = ImageEncoder(section, setting="vae")
        except ImportError as error:
            raise ConfigError(f"vae: decoding needs a package: {error}; pip install 'pixart-toolkit[data]'") from error
        found = self.vae.facts["channels"]
        if found != model["channels"]:
            raise ConfigError(
                f"vae: expected one with {model['channels']} latent channels, {section.model} has {found}; "
                "give the one that made the features"
            )

    def jpeg(self, moments: Any) -> bytes:
        """Decode the mean of a posterior (2, C, h, w)."""
        import torch

        image = self.vae.decode(torch.from_numpy(moments[0].astype(np.float32))[None])[0]
        return _jpeg(image)


def choose(images: FeatureSet, count: int) -> Entries:
    """Return records of a set, spread over its buckets and within them; small buckets get one at least, if they can."""
    rows = [int(bucket["rows"]) for bucket in images.manifest.buckets]
    quotas = [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: -rows[number])
    left = min(count, len(images), sum(rows))
    while left:
        for number in order:
            if left and quotas[number] < rows[number]:
                quotas[number] += 1
                left -= 1
    starts = np.cumsum([0, *rows])
    places = [
        int(start) + (2 * i + 1) * num_rows // (2 * quota)
        for start, num_rows, quota in zip(starts, rows, quotas, strict=False)
        for i in range(quota)
    ]
    return np.array(images.entries[places])


def thumbnails(images: FeatureSet, texts: Sequence[FeatureSet], decoder: Decoder | None, count: int) -> list[Thumbnail]:
    """Return samples of an image set, pictures decoded if there is a decoder.

    Raises:
        DataError: If a set's files do not belong together.
        JobError: If the storage fails.
    """
    records = choose(images, count)
    records = records[records["check"] == checks(records)]  # the survey tells of the others
    rows = index_rows(images.root / INDEX, [int(row) for row in records["row"]], _IMAGE)
    found = [Thumbnail(rows[int(record["row"])]) for record in records]
    for text_set in texts:
        for thumbnail, row in zip(found, _texts_of(records, text_set), strict=True):
            if row is not None and row["key"] == thumbnail.row["key"]:
                thumbnail.texts[text_set.root.name] = row
    for num_done, (i, data) in enumerate(read_members(images, records) if decoder is not None else (), 1):
        if num_done % _PICTURES_A_LINE == 0:
            log.info("inspect: picture %d of %d", num_done, len(records))
        if isinstance(data, DataError):
            found[i].problem = str(data)
        elif decoder is not None:
            moments = moments_of(data, images.manifest, records[i])
            if np.isfinite(moments).all():
                found[i].jpeg = decoder.jpeg(moments)
            else:
                found[i].problem = "its latents hold NaN or infinite values"
    return found


def _texts_of(records: Entries, texts: FeatureSet) -> list[dict[str, Any] | None]:
    """Return the index rows that have the keys of image records; None where there is none."""
    row_of: dict[int, int] = {}
    for start in range(0, len(texts), _RECORDS_AT_ONCE):
        some = texts.entries[start : start + _RECORDS_AT_ONCE]
        held = some[np.isin(some["key"], records["key"])]
        row_of |= dict(zip(held["key"].tolist(), held["row"].tolist(), strict=True))
    rows = index_rows(texts.root / INDEX, list(row_of.values()), _TEXT)
    return [rows.get(row_of.get(int(key), -1)) for key in records["key"]]


def _jpeg(image: "Image") -> bytes:
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
