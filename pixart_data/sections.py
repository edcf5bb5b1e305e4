"""The sections of job files that the data library owns."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pixart_data.config import LocalPath, ModelId, Section

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]

PAPER_PROMPT = "Describe this image and its style in a very detailed manner"
QUOTING_PROMPT = (
    'Given the caption of this image "{caption}", describe this image and its style in a very detailed manner'
)


class Source(Section):
    """Where the images are. They are read in place and never copied."""

    paths: list[LocalPath] = Field(min_length=1)
    """Tars, folders of images, `.jsonl` or `.parquet` lists of paths; `*` and `**` expand."""
    layout: Literal["auto", "sa1b", "img2dataset", "folder", "list"] = "auto"
    """How the images are laid out; `auto` looks at the path and at the first members of a tar."""
    root: LocalPath | None = None
    """Name source shards by their path below this folder; needed only when two of them have the same file name."""
    path_column: str = "path"
    """For lists: the column that holds the image path, absolute or relative to the list."""
    caption_column: str = "caption"
    """For lists: the column that holds the raw caption, if there is one."""
    rows_per_unit: int = Field(default=1000, ge=1)
    """Folders and lists are cut into units of this many images; a tar is always one unit."""
    max_image_pixels: int = Field(default=200_000_000, ge=1)
    """Images that claim more pixels are rejected unread: a decompression bomb costs memory, not a row."""


class Captioner(Section):
    """The image-text model that describes the images."""

    model: ModelId = "llava-hf/llava-1.5-7b-hf"
    """Anything that `AutoModelForImageTextToText` loads."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    prompt: str = PAPER_PROMPT
    """The paper's prompt, for images without a caption of their own."""
    prompt_with_caption: str | None = None
    """For images with a raw caption, quoted as `{caption}`; unset, they get `prompt` too."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longer answers are cut off, which their `finish_reason` says."""
    batch_size: int = Field(default=16, ge=1)
    """Images that are described at once."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 decodes greedily."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the probability that sampling draws from."""
    seed: int = 0
    """Of the sampling, when the temperature is above 0; every unit draws from (seed, unit)."""
    min_side_px: int = Field(default=672, ge=1)
    """Images are shrunk while decoding, by JPEG's own powers of two, as long as both sides stay above this."""
    dtype: Dtype = "auto"
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""

    @model_validator(mode="after")
    def _quotes_the_caption(self) -> Self:
        if self.prompt_with_caption is not None and "{caption}" not in self.prompt_with_caption:
            raise ValueError(f"prompt_with_caption: expected a text with {{caption}} in it, e.g. {QUOTING_PROMPT!r}")
        return self


class ImageFeatures(Section):
    """VAE posteriors of images resized to cover their bucket and cut at the centre."""

    model: ModelId = "stabilityai/sd-vae-ft-ema"
    """An `AutoencoderKL` of the Stable Diffusion family: 8x downsampling, 4 channels."""
    subfolder: str | None = None
    """Folder of the model inside its repository, e.g. `vae`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    resolution_px: Literal[256, 512, 1024] = 256
    """Side of the square with the area of a bucket; picks one of the reference's three tables of 40 buckets."""
    batch_size: int = Field(default=16, ge=1)
    """Images of one bucket that are encoded at once."""
    dtype: Dtype = "auto"
    """Of the arithmetic; `auto`: fp32. Features are stored as fp16 either way."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    set: str | None = None
    """Name of the feature set; `256px` for resolution 256."""

    @property
    def set_name(self) -> str:
        """The folder of the feature set in the dataset."""
        return self.set or f"{self.resolution_px}px"


class TextFeatures(Section):
    """T5 features of captions, true tokens only."""

    model: ModelId = "DeepFloyd/t5-v1_1-xxl"
    """A T5 encoder with its tokenizer."""
    subfolder: str | None = None
    """Folder of the encoder inside its repository, e.g. `text_encoder`."""
    tokenizer_subfolder: str | None = None
    """Folder of the tokenizer inside the repository, e.g. `tokenizer`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    max_tokens: int = Field(default=120, ge=1)
    """Longer captions are cut, which the index records."""
    cleaning: Literal["whitespace-1"] = "whitespace-1"
    """The versioned text-cleaning policy, shared by training and sampling."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Captions are sorted by length and batched up to this many padded tokens."""
    dtype: Dtype = "auto"
    """`auto`: bf16 on a GPU, fp32 on a CPU; features are stored as bf16 either way."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    set: str = Field(default="text", min_length=1)
    """Name of the feature set."""
