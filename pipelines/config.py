"""The job files of the stages that run on Ray."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pixart_data.config import LocalPath, ModelId, Section
from pixart_data.sections import (
    Captioner,
    Downloads,
    Filters,
    Gate,
    ImageFeatures,
    Source,
    TextFeatures,
    UrlLists,
    require_table,
)

_SET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_HOTTEST = 2.0  # temperature that OpenAI's API and the servers that follow it take


class Cluster(Section):
    """Where the work runs and how hard it tries."""

    address: str = "auto"
    """`auto`: the cluster that RAY_ADDRESS names (inside a submitted job that is its own), else a new one on this
    machine; `local`: always a new one; or `host:port` of a running head."""
    num_workers: int | None = Field(default=None, ge=1)
    """Processes that load the model; unset: one for each GPU, or one on a machine without (stats: one for each CPU)."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """Unset: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """Unset: an equal share of a node's; that many threads decode images."""
    max_attempts: int = Field(default=3, ge=1)
    """A unit that fails this often is set aside; the job goes on, names it at the end and exits with 4."""
    max_rejected: float = Field(default=0.2, ge=0.0, le=1.0)
    """Above this share of rejected rows the finished job exits with 3; runs of under 100 rows are not judged."""
    max_rejected_by_reason: dict[str, float] = {}
    """The same for single reasons, e.g. `{ truncated_image = 0.01 }`."""
    stall_s: float = Field(default=1800.0, gt=0)
    """A unit without a new row, or a model that is not loaded, after this long hangs: its worker is killed, and the
    unit tried again."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """What an hour of one worker costs, in dollars: for the costs that `pixart status` shows."""


class Gating(Gate):
    """Which captions are asked for again with other decoding; `--retry-failed-gate` adds it with its defaults."""

    attempts: int = Field(default=2, ge=0)
    """A caption that fails is asked for again up to this often, and marked if none passes; 0 only marks. More than
    before: what still fails is asked for as often as is left."""
    temperatures: list[float] = Field(default=[0.5, 0.9], min_length=1)
    """Of these answers, one after the other, from 0 to 2; the last one is for all further ones."""
    top_p: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of the probability that they are drawn from."""
    frequency_penalty: float = Field(default=0.3, ge=0.0, le=2.0)
    """After a loop: taken off a token's score for each time that the answer has it already, as OpenAI's API has it."""
    more_tokens: float = Field(default=1.5, ge=1.0)
    """After a truncated caption: this many times `captioner.max_new_tokens`, or just these from a server that has no
    room for more."""
    approximate: bool = False
    """Tag words with TextBlob's lexicon, which comes with the package, instead of with NLTK's data."""

    @field_validator("temperatures")
    @classmethod
    def _are_what_servers_take(cls, temperatures: list[float]) -> list[float]:
        wrong = [temperature for temperature in temperatures if not 0 <= temperature <= _HOTTEST]
        if wrong:
            raise ValueError(f"expected temperatures from 0 to {_HOTTEST:g}, found {wrong[0]:g}")
        return temperatures


class Caption(Section):
    """`pixart caption`: images to a Parquet table of captions, one part for each source shard."""

    output: LocalPath
    """Directory of the table."""
    source: Source
    captioner: Captioner = Captioner()
    gate: Gating | None = None
    """Unset: captions are not judged."""
    cluster: Cluster = Cluster()


class Filter(Section):
    """`pixart filter`: measures every image, and lists those that pass the filters for the stages that follow."""

    output: LocalPath
    """Directory of the measurements and of what was kept; the `source.kept` of the stages that follow."""
    source: Source
    filters: Filters = Filters()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _reads_all(self) -> Self:
        if self.source.kept is not None:
            raise ValueError("source.kept: expected none, as a filter reads the whole source; put all filters in one")
        return self


class FetchCluster(Cluster):
    """Where the work runs and how hard it tries; `fetch` uses no GPU and takes a worker for each CPU."""

    max_rejected: float = Field(default=0.5, ge=0.0, le=1.0)
    """Above this share of rejected rows the finished job exits with 3; lists of URLs age, hence so high."""


class Fetch(Section):
    """`pixart fetch`: lists of URLs to tars of images, one for each slice of a list."""

    output: LocalPath
    """Directory of the images; a `source.paths` of the stages that follow."""
    urls: UrlLists
    downloads: Downloads = Downloads()
    cluster: FetchCluster = FetchCluster()


class CaptionSet(Section):
    """Captions to count: a table that `caption` wrote, Parquet or JSONL tables, or text files with a caption a line."""

    name: str = Field(min_length=1)
    """As the report shows it."""
    path: LocalPath
    """The output directory of `caption`, a file, or a folder of files, local or as `s3://...`; `*` and `**` expand. Of
    a folder with tables and text files, the tables are read."""
    column: str = Field(default="caption", min_length=1)
    """The column to count; text files have none."""
    raw_column: str = "raw_caption"
    """Where a table has this column beside `column`, it is counted too, as the set NAME-raw, and the two are compared
    on the same images; empty: it is not."""


MOST_PICTURES = 200
"""Of a gallery; so many are drawn for while captions are counted, whatever it shows then."""


class Gallery(Section):
    """Pictures for the report, with their raw and their dense captions."""

    source: Source
    """The images that the captions describe, as `caption` read them."""
    num_pictures: int = Field(default=24, ge=1, le=MOST_PICTURES)
    """How many are shown; each adds up to 40 kB to the page."""
    seed: int = 0
    """Which these are."""


class Stats(Section):
    """`pixart stats`: noun density and quality of caption sets, beside the paper's Table 1."""

    output: LocalPath
    """Directory of stats.json, report.html and the figures."""
    sets: list[CaptionSet] = []
    """The captions to count, in the order of the report."""
    compare: dict[str, str] = {}
    """Which set is compared with which, e.g. `{ dense = "raw" }`: the nouns that the first has gained. A set with a
    `raw_column` is compared with that by itself."""
    approximate: bool = False
    """Count with TextBlob's lexicon, which needs no data files; its figures are marked, and kept apart from NLTK's."""
    download_nltk: bool = False
    """Fetch NLTK's data, as NLTK does, where it is missing."""
    threshold: int = Field(default=10, ge=0)
    """A noun is valid if it appears more often than this; the paper's is 10."""
    tokenizer: ModelId | None = None
    """Measure lengths in tokens of this T5, e.g. "DeepFloyd/t5-v1_1-xxl"; unset: they are not measured."""
    tokenizer_subfolder: str | None = None
    """Folder of the tokenizer inside its repository."""
    max_tokens: int = Field(default=120, ge=1)
    """What the lengths are held against: longer captions are cut when features are extracted."""
    resolution_px: Literal[256, 512, 1024] = 256
    """Whose canvases the sizes of the images are held against, where a table has their `width_px` and `height_px`."""
    measures: bool = True
    """Keep the quality of every caption, with its key, as measures/*.parquet: about 20 bytes a caption."""
    gate: Gate = Gate()
    cluster: Cluster = Cluster()
    gallery: Gallery | None = None
    """Unset: no pictures."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [caption_set.name for caption_set in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sets: expected different names, found '{twice[0]}' twice; rename one, e.g. other=PATH")
        places: dict[tuple[str, str], str] = {}
        for one in self.sets:
            other = places.setdefault((one.path.rstrip("/"), one.column), one.name)
            if other != one.name:
                raise ValueError(
                    f"sets: expected different captions, found column '{one.column}' of {one.path} as '{other}' and as "
                    f"'{one.name}'; remove one"
                )
        return self

    @model_validator(mode="after")
    def _has_work(self) -> Self:
        if not self.sets and not self.download_nltk:
            raise ValueError("sets: expected at least one, found none; name a caption table, e.g. captions.parquet")
        return self


class CaptionInput(Section):
    """The captions to encode."""

    path: LocalPath
    """The output directory of `caption`, or a Parquet or JSONL file, or a folder of them, with a `key` column."""
    column: str = "caption"
    """`raw_caption` takes the text that came with the images."""
    more: dict[str, str] = {}
    """Further text sets and the columns that they encode, e.g. `{ text-short = "caption_short", text-raw =
    "raw_caption" }`; `train` mixes them with `data.text_mix`."""

    @model_validator(mode="after")
    def _names_folders(self) -> Self:
        wrong = [name for name in self.more if not _SET_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"more: expected names of folders, e.g. text-short, found {wrong[0]!r}; rename it")
        return self


class Extract(Section):
    """`pixart extract`: feature sets for training. A set is made if its section is there, and redone if it changed."""

    output: LocalPath
    """Directory of the dataset; each feature set is a folder in it."""
    source: Source | None = None
    """Needed for images, and for texts that come with the images."""
    captions: CaptionInput | None = None
    """Unset: the raw captions of the source."""
    image: ImageFeatures | None = None
    text: TextFeatures | None = None
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _has_work(self) -> Self:
        if self.image is None and self.text is None:
            raise ValueError("expected a section [image], [text] or both, found neither; add one, empty for defaults")
        if self.source is None and (self.image is not None or self.captions is None):
            raise ValueError("source: required, and missing; add [source] with paths = [...]")
        if self.image is not None and self.text is not None and self.image.set_name == self.text.set:
            raise ValueError(f"text.set: expected a name of its own, found '{self.text.set}' for images too")
        self._more_has_names_of_its_own()
        return self

    def _more_has_names_of_its_own(self) -> None:
        more = self.captions.more if self.captions is not None else {}
        if more and self.text is None:
            raise ValueError("captions.more: expected a section [text] beside it, found none; add one")
        taken = {self.image.set_name if self.image else None, self.text.set if self.text else None}
        twice = sorted(name for name in more if name in taken)
        if twice:
            raise ValueError(f"captions.more: expected names of their own, found '{twice[0]}' twice; rename one")

    @property
    def text_columns(self) -> dict[str, str]:
        """The text sets that the job makes and the column of captions in each, the main one first."""
        if self.text is None:
            return {}
        if self.captions is None:
            return {self.text.set: ""}
        return {self.text.set: self.captions.column, **self.captions.more}


class Compact(Section):
    """`pixart compact`: a dataset with few large shards in place of many small ones, in random order."""

    path: LocalPath
    """The dataset to read; it stays as it is."""
    output: LocalPath
    """Folder of the compacted dataset; run again after `path` has grown, it gains the new samples."""
    shard_bytes: int = Field(default=512 << 20, ge=1 << 16)
    """Size that shards are filled up to; those of a dataset that grew stay as they are."""
    image_set: str | None = None
    """The image set whose order text sets follow; unset: the first by name."""
    cluster: Cluster = Cluster()


class ImportedImages(Section):
    """The latents to import, and what the files do not say of them."""

    set: str | None = None
    """Name of the feature set; `256px` for resolution 256."""
    resolution_px: Literal[256, 512, 1024] = 256
    """Side of the square with the area of a canvas; chooses among folders and columns that are named after it."""
    buckets: list[str] | None = Field(default=None, min_length=1)
    """The canvases, as `HEIGHTxWIDTH` in pixels; samples of others are rejected. Unset: those that are found."""
    folder: str | None = None
    """Layout `reference` or `diffusers`: the folder of the latents, below `path`; unset: the one of the usual name, or
    `path` itself."""
    column: str | None = Field(default=None, min_length=1)
    """Layout `mds`: the column of the latents; unset: `moments`, `latents_256` (512, 1024) or `latents`."""
    model: ModelId = "stabilityai/sd-vae-ft-ema"
    """The VAE that they were made with; PixArt-Sigma: `madebyollin/sdxl-vae-fp16-fix`, micro_diffusion:
    `stabilityai/stable-diffusion-xl-base-1.0` with `subfolder = "vae"`."""
    subfolder: str | None = None
    """Folder of the VAE inside its repository."""
    scaling_factor: float = Field(default=0.18215, gt=0)
    """Of the VAE; 0.13025 for that of Stable Diffusion XL. Training multiplies by it."""
    scaled: bool = True
    """Latents that were drawn from the posterior once were multiplied by `scaling_factor` before they were stored;
    posteriors never are."""
    channels: int = Field(default=4, ge=1)
    """Of the latents."""

    _makes_a_table = field_validator("buckets")(require_table)

    @property
    def set_name(self) -> str:
        """The folder of the feature set in the dataset."""
        return self.set or f"{self.resolution_px}px"


class ImportedTexts(Section):
    """The text features to import, and what the files do not say of them."""

    set: str = Field(default="text", min_length=1)
    """Name of the feature set."""
    folder: str | None = None
    """Layout `reference` or `diffusers`: the folder of the text features, below `path`; unset: the one of the usual
    name, or `path` itself."""
    column: str | None = Field(default=None, min_length=1)
    """Layout `mds`: the column of the text features; unset: `t5`, `caption_latents` or `prompt_embeds`."""
    caption_column: str | None = Field(default=None, min_length=1)
    """Key or column of the caption; unset: `prompt` for `reference`, `caption` for `mds`."""
    model: ModelId = "DeepFloyd/t5-v1_1-xxl"
    """The text encoder that they were made with."""
    subfolder: str | None = None
    """Folder of the encoder inside its repository."""
    tokenizer_subfolder: str | None = None
    """Folder of the tokenizer inside the repository."""
    width: int | None = Field(default=None, ge=1)
    """Numbers for each token; unset: as the first features have it. Required where MDS holds bare bytes."""
    null_caption: LocalPath | None = None
    """A .npz with the features of the empty caption, in the reference's form; unset: `null_caption.npz` in `path`, if
    it is there. A set without cannot be trained on."""


class Import(Section):
    """`pixart import`: features that other tools wrote, as a dataset."""

    path: LocalPath
    """The folder that the other tool wrote."""
    layout: Literal["reference", "mds", "diffusers"]
    """The PixArt-alpha reference's folders of .npz and .npy files, MosaicML's MDS as micro_diffusion fills it or as
    `export` does, or .pt files of tensors."""
    output: LocalPath
    """Folder of the dataset."""
    lists: list[str] = []
    """Layout `reference`: lists to read, below `path`; empty: all in `partition`, else in `partition_filter`, else in
    `path`."""
    rows_per_unit: int = Field(default=1000, ge=1)
    """Samples in a unit of work; of MDS, a shard is one."""
    bytes_dtype: Literal["float16", "float32"] = "float16"
    """Layout `mds`: type of the numbers in columns of bare bytes."""
    image: ImportedImages = ImportedImages()
    text: ImportedTexts = ImportedTexts()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _sets_differ(self) -> Self:
        if self.image.set_name == self.text.set:
            raise ValueError(f"text.set: expected a name of its own, found '{self.text.set}' for images too")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_layout(self) -> Self:
        keys = {
            "lists": (self.lists, ("reference",)),
            "image.folder": (self.image.folder, ("reference", "diffusers")),
            "text.folder": (self.text.folder, ("reference", "diffusers")),
            "image.column": (self.image.column, ("mds",)),
            "text.column": (self.text.column, ("mds",)),
            "text.caption_column": (self.text.caption_column, ("reference", "mds")),
        }
        for key, (given, layouts) in keys.items():
            if given and self.layout not in layouts:
                raise ValueError(
                    f"{key}: expected only with layout {' or '.join(layouts)}, not {self.layout}; remove it"
                )
        return self
