"""The job files of the commands that do without Ray, and of `retry`."""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pixart_data.config import LocalPath, ModelId, Section
from pixart_data.sections import Device

MOST_BUCKETS = 200
MOST_PARTS = 100
_PART = re.compile(r"[A-Za-z0-9][\w.-]*")


class Inspect(Section):
    """`pixart inspect`: what a dataset, a table of captions, a checkpoint or a shard holds."""

    path: LocalPath
    """What to show."""
    num_samples: int = Field(default=3, ge=0)
    """How many samples to show of each part."""
    html: LocalPath | None = None
    """Of a dataset: a page to write, with pictures decoded from the stored latents."""
    num_pictures: int = Field(default=24, ge=0)
    """Pictures on the page, shared among the image sets and spread over their buckets; 0 loads no VAE."""
    vae: ModelId | None = None
    """Decodes the pictures; unset, the model that the image set's manifest names."""
    vae_subfolder: str | None = None
    """Folder of the model inside `vae`; read only when that is set."""
    device: Device = "auto"
    """Of the VAE; `auto`: a GPU if there is one."""


class Verify(Section):
    """`pixart verify`: re-read a dataset or a table of captions, and name what is damaged."""

    path: LocalPath
    """A dataset, a feature set, the output directory of a stage, or a folder with several of them."""
    fast: bool = False
    """Read the sizes of files, manifests and indexes only."""
    recompute: int = Field(default=0, ge=0)
    """Samples of each feature set to compute again from their sources with the models, and to compare with what is
    stored."""
    seed: int = Field(default=0, ge=0)
    """Which samples these are."""


class Diff(Section):
    """`pixart diff`: what differs between two datasets, or two feature sets."""

    left: LocalPath
    """A dataset or a feature set."""
    right: LocalPath
    """The one to compare it with."""
    num_samples: int = Field(default=3, ge=0)
    """How many samples to name of each difference."""


class Merge(Section):
    """`pixart merge`: datasets with different samples and the same encoders, joined into one."""

    paths: list[LocalPath] = Field(min_length=1)
    """Datasets; their shards are linked where the file system can, else copied."""
    output: LocalPath
    """Folder of the joint dataset."""


class Split(Section):
    """`pixart split`: a dataset into parts, which are datasets over the same shards."""

    path: LocalPath
    """The dataset."""
    output: LocalPath
    """Folder of the parts, each in a folder of its name."""
    share: dict[str, float] = {}
    """Random parts and their shares, e.g. `{ train = 0.99, val = 0.01 }`; a sample stays in its part for ever."""
    where: dict[str, str] = {}
    """Parts by a query on an index, e.g. `{ large = "original_height_px >= 1024" }`; what matches none is left out."""
    queried_set: str | None = None
    """The feature set whose index queries are about, the others follow its keys; unset: the only image set."""

    @field_validator("share", mode="before")
    @classmethod
    def _are_numbers(cls, given: Any) -> Any:
        """Shares come as texts from a command line."""
        if not isinstance(given, dict):
            return given
        shares = {}
        for name, share in given.items():
            try:
                shares[name] = float(share)
            except (TypeError, ValueError):
                raise ValueError(f"expected NAME=SHARE, e.g. val=0.01, found {name}={share}") from None
            if not 0 < shares[name] <= 1:
                raise ValueError(f"expected shares above 0 and up to 1, found {name}={share}")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"expected shares that add up to at most 1, found {sum(shares.values()):g}; make one less")
        return shares

    @model_validator(mode="after")
    def _has_parts(self) -> Self:
        parts = [*self.share, *self.where]
        if not parts or (self.share and self.where):
            found = "both" if parts else "neither"
            raise ValueError(
                f"expected either --share NAME=SHARE or --where NAME=QUERY, found {found}; give one of them"
            )
        wrong = [name for name in parts if not _PART.fullmatch(name)]
        if wrong or len(parts) > MOST_PARTS:
            what = f"{wrong[0]!r}" if wrong else f"{len(parts)} of them"
            raise ValueError(
                f"expected up to {MOST_PARTS} names of folders, e.g. train, found {what}; rename or omit it"
            )
        if self.queried_set is not None and not self.where:
            raise ValueError("queried_set: expected it beside --where, found no query; leave it out")
        return self


class Export(Section):
    """`pixart export`: a dataset in the layout of another tool."""

    path: LocalPath
    """The dataset."""
    layout: Literal["reference", "mds"]
    """The PixArt-alpha reference's folders of .npz and .npy files, or MosaicML's MDS."""
    output: LocalPath
    """Folder to write to."""
    image_set: str = "256px"
    """Name of the image feature set."""
    text_set: str = "text"
    """Name of the text feature set."""


class Convert(Section):
    """`pixart convert`: weights of the transformer in the layout that another program reads."""

    path: ModelId
    """A checkpoint or a run of `pixart train`, a `.pth` of PixArt, a `.pt` of DiT, a `.safetensors` file, or a folder
    or hub id of diffusers' `PixArtTransformer2DModel`."""
    layout: Literal["diffusers", "pth", "safetensors", "pipeline"]
    """diffusers' `PixArtTransformer2DModel`; the PixArt-alpha repository's `.pth` (of a DiT, DiT's `.pt`), with the
    moving average beside the weights; one file of safetensors under the same names; or a whole `PixArtAlphaPipeline`
    with text encoder, VAE and scheduler."""
    output: LocalPath
    """Folder to write to."""
    use_ema: bool = True
    """Take the moving average of the weights, where there is one; with `pth`, write it too."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads, where neither a configuration nor the width of a published size tells them."""
    base_size: int | None = Field(default=None, ge=1)
    """As in `model.base_size`, where neither a configuration nor stored positions tell it."""
    interpolation_scale: float | None = Field(default=None, gt=0)
    """As in `model.interpolation_scale`, likewise."""
    text_encoder: ModelId | None = None
    """Of a pipeline: unset, the encoder that made the training features."""
    text_encoder_subfolder: str | None = None
    """Folder of the encoder inside `text_encoder`; read only when that is set."""
    tokenizer_subfolder: str | None = None
    """Folder of the tokenizer inside `text_encoder`; read only when that is set."""
    vae: ModelId | None = None
    """Of a pipeline: unset, the model that made the training features."""
    vae_subfolder: str | None = None
    """Folder of the model inside `vae`; read only when that is set."""


class Buckets(Section):
    """`pixart buckets`: a table of buckets for the sizes of your images, and what each choice loses."""

    paths: list[LocalPath] = Field(min_length=1)
    """Datasets, outputs of `caption`, `fetch` or `filter`, Parquet files with widths and heights, or images as
    `source.paths` takes them, of which only the headers are read."""
    resolution_px: Literal[256, 512, 1024] = 256
    """Side of the square with the area of a canvas."""
    num_buckets: list[int] = Field(default=[4, 8, 12, 16, 24, 32, 40], min_length=1)
    """How many canvases to compare; one number alone is a list of it."""
    batch_size: int = Field(default=32, ge=1)
    """Samples in a batch of one GPU; a batch is of one canvas."""
    num_gpus: int = Field(default=8, ge=1)
    """Each takes a batch of its own and waits for the one with the largest canvas."""
    multiple_px: int = Field(default=16, ge=16)
    """Sides of canvases are multiples of this. 16, a latent cell of 8 px times the model's patch of 2, leaves most to
    choose from; the reference's tables have 16 at 256 px, 32 at 512 and 64 at 1024."""
    min_area: float = Field(default=0.9, gt=0.0, le=1.0)
    """Least area of a canvas as a share of the square's; none is larger than the square. The reference's go down to
    0.9."""
    max_aspect: float = Field(default=4.0, ge=1.0)
    """Longer over shorter side of a canvas, at most; images beyond are cropped to it."""
    table: list[str] | None = Field(default=None, min_length=1)
    """A table of your own to show beside the others, as `image.buckets` has it."""
    every: int = Field(default=1, ge=1)
    """Where headers are read, read every n-th unit only (a tar, or 1,000 files) and count its images n times."""

    @field_validator("num_buckets", mode="before")
    @classmethod
    def _from_one(cls, given: Any) -> Any:
        return [given] if isinstance(given, int) else given

    @field_validator("num_buckets")
    @classmethod
    def _are_positive(cls, numbers: list[int]) -> list[int]:
        if min(numbers) < 1 or max(numbers) > MOST_BUCKETS:
            raise ValueError(f"expected numbers from 1 to {MOST_BUCKETS}, found {numbers}")
        return sorted(set(numbers))


class Status(Section):
    """`pixart status`: where the runs of an output directory stand."""

    path: LocalPath
    """The output directory of a stage, of a training run or of a dataset, local or on an object store, or the job file
    that names it."""
    as_json: bool = False
    """Print one JSON object, for programs."""


class Retry(Section):
    """`pixart retry`: do the rejected rows of a finished run again; what is good stays as it is."""

    path: LocalPath
    """The output directory of `fetch`, `caption`, `extract` or `import`, or one feature set of a dataset."""
    reasons: list[str] = []
    """Only the rows that were rejected for these; empty: all rejected rows."""
