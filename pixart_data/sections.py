"""The sections of job files that the data library owns."""

import re
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pixart_data.buckets import Bucket, bucket_table, custom_table
from pixart_data.config import LocalPath, ModelId, Section
from pixart_data.errors import ConfigError

Codec = Literal["bf16", "bf16-packed", "int8"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]

_COLUMN = re.compile(r"[a-z][a-z0-9_]*")

PAPER_PROMPT = "Describe this image and its style in a very detailed manner"
QUOTING_PROMPT = (
    'Given the caption of this image "{caption}", describe this image and its style in a very detailed manner'
)


class Source(Section):
    """Where the images are. They are read in place."""

    paths: list[LocalPath] = Field(min_length=1)
    """Tars, folders of images, `.jsonl` or `.parquet` lists of paths, local or as `s3://...`; `*` and `**` expand."""
    layout: Literal["auto", "sa1b", "img2dataset", "folder", "list"] = "auto"
    """How the images are laid out; `auto` looks at the path and at the first members of a tar."""
    root: LocalPath | None = None
    """Name source shards by their path below this folder; needed only when two of them have the same file name."""
    path_column: str = "path"
    """For lists: the column that holds the image path, absolute or relative to the list."""
    caption_column: str = "caption"
    """For lists: the column that holds the raw caption, if there is one."""
    rows_per_unit: int = Field(default=1000, ge=1)
    """Folders and lists are cut into units of this many images."""
    bytes_per_unit: int = Field(default=1 << 30, ge=512)
    """A local tar of more than 1.5 times this is cut into units of about this size; 1 GiB."""
    max_image_pixels: int = Field(default=200_000_000, ge=1)
    """Images that claim more pixels are rejected unread: a decompression bomb costs memory, not a row."""
    kept: LocalPath | None = None
    """The output directory of `filter`: only the images that it kept are read, as if there were no others."""


class Filters(Section):
    """Which images are rejected. Every filter is off unless it is set."""

    min_side_px: int | None = Field(default=None, ge=1)
    """Reject images with a shorter side."""
    max_aspect: float | None = Field(default=None, ge=1.0)
    """Reject images whose longer side is more than this many times the shorter one."""
    min_sharpness: float | None = Field(default=None, gt=0)
    """Reject images that are blurred: whose Laplacian varies less than this; 30 takes clear cases only."""
    watermark_column: str | None = Field(default=None, min_length=1)
    """Where the metadata of the images (img2dataset's Parquet or JSON, a list's columns) has the probability of a
    watermark; LAION's is `pwatermark`."""
    max_watermark: float | None = Field(default=None, ge=0.0, le=1.0)
    """Reject images with a higher probability of a watermark; those without one are kept."""
    languages: list[str] | None = Field(default=None, min_length=1)
    """Reject images whose raw caption is in another language than these, e.g. `["en", "de"]`; those without a caption
    are kept."""
    min_language_probability: float = Field(default=0.5, ge=0.0, le=1.0)
    """How sure of another language one must be; two words can be of any."""
    exact_duplicates: bool = False
    """Reject images whose bytes are those of an earlier one."""
    near_duplicates_bits: int | None = Field(default=None, ge=0, le=8)
    """Reject images whose perceptual hash differs from that of an earlier one in at most this many of 64 bits; 4 finds
    other sizes and qualities of a picture."""

    @model_validator(mode="after")
    def _knows_the_column(self) -> Self:
        if self.max_watermark is not None and self.watermark_column is None:
            raise ValueError('watermark_column: required by max_watermark, and missing; LAION\'s is "pwatermark"')
        return self


class UrlLists(Section):
    """The lists of URLs, with their captions."""

    paths: list[LocalPath] = Field(min_length=1)
    """`.parquet` or `.jsonl` files, or folders of them; `*` and `**` expand. Add new ones at the end: keys are numbered
    in this order."""
    url_column: str = "url"
    """The column that holds the URL (LAION-5B: `URL`)."""
    caption_column: str = "caption"
    """The column that holds the caption (LAION-5B: `TEXT`); empty: there is none."""
    rows_per_unit: int = Field(default=10_000, ge=1)
    """URLs in a unit of work, which becomes one tar."""


class Downloads(Section):
    """How images are asked for, and which are taken. Limits on requests are those of one worker."""

    concurrency: int = Field(default=128, ge=1)
    """Requests under way at once."""
    concurrency_per_host: int = Field(default=4, ge=1)
    """Requests under way at once to one host."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """For the name, the connection and TLS."""
    read_timeout_s: float = Field(default=15.0, gt=0)
    """Longest silence of a server."""
    total_timeout_s: float = Field(default=60.0, gt=0)
    """For one attempt, redirects and the last byte included."""
    max_attempts: int = Field(default=3, ge=1)
    """After 429, 5xx, a timeout or a broken connection, a URL is asked for again up to this many times in all."""
    backoff_s: float = Field(default=1.0, gt=0)
    """Pause before the second attempt, doubled for each further one; `Retry-After` of a server goes before it."""
    max_wait_s: float = Field(default=30.0, ge=0)
    """Longest pause; where a server's `Retry-After` asks for more, the URL is given up for now."""
    max_redirects: int = Field(default=5, ge=0)
    """Each hop is checked like the first URL."""
    max_bytes: int = Field(default=32 << 20, ge=1)
    """Of an image, after unpacking; nothing beyond is read, whatever the server says."""
    user_agent: str = Field(default="pixart-toolkit", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """Name sent to servers, and looked up in robots.txt and X-Robots-Tag."""
    contact: str | None = Field(default=None, pattern=r"^[!-'*-~]+$")
    """An address or URL where a server's owner reaches you, sent with the name. Please set it."""
    robots: bool = True
    """Read each host's robots.txt and keep to it (RFC 9309)."""
    opt_out_directives: list[str] = ["noai", "noimageai", "noindex", "noimageindex"]
    """Images whose `X-Robots-Tag` says one of these, to all or to us, are not taken; nor, unless the list is empty,
    those with `tdm-reservation: 1`."""
    allow_private_addresses: bool = False
    """Ask servers of this machine and of the local network too: for an intranet of your own, never for lists from the
    web."""
    check: Literal["full", "header"] = "full"
    """`full` decodes each image, so that damaged ones are rejected here; `header` looks at its first bytes only."""
    min_side_px: int = Field(default=1, ge=1)
    """Images with a shorter side are rejected."""
    max_aspect: float | None = Field(default=None, ge=1.0)
    """Images whose longer side is more than this many times the shorter one are rejected; unset: none are."""
    max_image_pixels: int = Field(default=200_000_000, ge=1)
    """Images that claim more pixels are rejected undecoded."""


class Server(Section):
    """Servers that describe the images instead of this process: vLLM, SGLang or whatever else speaks OpenAI's API."""

    urls: list[str] = Field(min_length=1)
    """Where they answer, e.g. `http://host:8000/v1`; all serve the same model, and the least busy one is asked."""
    concurrency: int = Field(default=32, ge=1)
    """Requests in flight at once from each worker, over all its servers."""
    api_key_env: str | None = None
    """The environment variable, on the workers' machines, that holds the API key; unset, none is sent."""
    max_side_px: int = Field(default=1024, ge=28)
    """Images are shrunk until their longer side has at most this many pixels."""
    jpeg_quality: int = Field(default=90, ge=30, le=95)
    """Images travel as JPEG of this quality, colours at full resolution."""
    timeout_s: float = Field(default=180.0, gt=0)
    """An answer that takes longer is given up and asked for again."""
    max_attempts: int = Field(default=4, ge=1)
    """An image is asked about this often before it is rejected with `server_error`, if the server is well otherwise."""
    patience_s: float = Field(default=300.0, ge=0)
    """A server that is away or overloaded is waited for this long before the shard fails, to be tried again later."""

    @field_validator("urls", mode="before")
    @classmethod
    def _holds_no_secret(cls, given: Any) -> Any:
        """Comes first, since later complaints quote what they found."""
        for url in given if isinstance(given, list) else [given]:
            if isinstance(url, str) and "@" in url:  # wherever: passwords are not always percent-encoded
                raise ValueError(
                    "expected URLs without a user name or password, found one before an @; put the key into an "
                    "environment variable and name that in api_key_env"
                )
        return given

    @model_validator(mode="after")
    def _speaks_http(self) -> Self:
        wrong = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"urls: expected http://host:port/v1 or https://..., found {wrong[0]!r}")
        return self


class Captioner(Section):
    """The image-text model that describes the images."""

    model: ModelId = "llava-hf/llava-1.5-7b-hf"
    """Anything that `AutoModelForImageTextToText` loads; with a server, the name under which it serves the model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    prompt: str = PAPER_PROMPT
    """The paper's prompt, for images without a caption of their own."""
    prompt_with_caption: str | None = None
    """For images with a raw caption, quoted as `{caption}`; unset, they get `prompt` too."""
    prompts: dict[str, str] = {}
    """Further captions of each image, e.g. `{short = "Describe this image in one sentence"}`: the answer becomes the
    column `caption_short`. One that quotes `{caption}` is asked of images with a raw caption only."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longer answers are cut off, which their `finish_reason` says."""
    batch_size: int = Field(default=16, ge=1)
    """Images that are described at once."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 decodes greedily."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the probability that sampling draws from."""
    seed: int = 0
    """Of the sampling, when the temperature is above 0. In this process each batch draws from (seed, unit, key of its
    first image), so that `batch_size` decides too; servers get a seed for each image, of (seed, unit, key, prompt)."""
    min_side_px: int = Field(default=672, ge=1)
    """Images are shrunk while decoding, by JPEG's own powers of two, as long as both sides stay above this."""
    dtype: Dtype = "auto"
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    server: Server | None = None
    """Unset, the model runs in this process. A URL alone is a server with the defaults."""

    @field_validator("server", mode="before")
    @classmethod
    def _from_urls(cls, given: Any) -> Any:
        urls = [given] if isinstance(given, str) else given
        return {"urls": urls} if isinstance(urls, list) else given

    @model_validator(mode="after")
    def _quotes_the_caption(self) -> Self:
        if self.prompt_with_caption is not None and "{caption}" not in self.prompt_with_caption:
            raise ValueError(f"prompt_with_caption: expected a text with {{caption}} in it, e.g. {QUOTING_PROMPT!r}")
        wrong = [name for name in self.prompts if not _COLUMN.fullmatch(name)]
        if wrong:
            raise ValueError(f"prompts: expected names of a-z, 0-9 and _, e.g. short, found {wrong[0]!r}; rename it")
        return self

    @property
    def questions(self) -> dict[str, str]:
        """Every column of captions and the prompt whose answers it holds, the main one first."""
        return {"caption": self.prompt} | {f"caption_{name}": prompt for name, prompt in self.prompts.items()}


def require_table(sizes: list[str] | None, info: ValidationInfo) -> list[str] | None:
    """Check that the canvases of a section make a table at its `resolution_px`; raises ValueError, for pydantic."""
    if sizes is not None and "resolution_px" in info.data:
        try:
            custom_table(sizes, info.data["resolution_px"])
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return sizes


class Gate(Section):
    """What a caption must be like. The defaults let pass what LLaVA writes when nothing goes wrong."""

    model_config = ConfigDict(allow_inf_nan=False)  # beside what all sections have

    truncated: bool = True
    """Fail captions that break off: at `max_new_tokens`, or without a final mark (those of 32 tokens and more, or that
    end in a word such as "the" or "of")."""
    refusal: bool = True
    """Fail captions with a sentence that begins as refusals do: "I'm sorry", "I cannot", "As an AI" ..."""
    echo: bool = True
    """Fail captions that repeat six words of their prompt in a row, or all of a shorter one; what the prompt itself
    quotes does not count."""
    max_repeated: float = Field(default=0.3, ge=0.0, le=1.0)
    """Fail captions that go round in a loop: a larger share of whose tokens are in a run of four that was there
    before. 1: none."""
    max_distinct_pairs: float = Field(default=0.99, ge=0.0, le=1.0)
    """Fail captions that ramble: a larger share of whose pairs of neighbours are different, in a text of
    `rambling_tokens`; decoding that forbids repetition ends so. 1: none, for a model that writes as varied as people
    do."""
    rambling_tokens: int = Field(default=80, ge=2)
    """Shorter captions do not ramble."""
    max_boilerplate: float = Field(default=0.75, ge=0.0, le=1.0)
    """Fail captions of three sentences and more of which a larger share begin with boilerplate: "The image features",
    "In addition to" ... 1: none."""
    min_tokens: int = Field(default=16, ge=0)
    """Fail shorter captions; punctuation counts. 0: none."""
    min_nouns: int = Field(default=4, ge=0)
    """Fail captions with fewer distinct nouns. 0: none."""


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
    buckets: list[str] | None = Field(default=None, min_length=1)
    """A table of your own in place of the reference's: canvases as `HEIGHTxWIDTH` in pixels, e.g. `["256x256",
    "288x224"]`, sides in multiples of 16 px; `pixart buckets` proposes one. Their order does not matter."""
    batch_size: int = Field(default=16, ge=1)
    """Images of one bucket that are encoded at once."""
    dtype: Dtype = "auto"
    """Of the arithmetic; `auto`: fp32. Features are stored as fp16 either way."""
    flips: bool = False
    """Store the posterior of the mirrored image too: twice the bytes, and `data.flip` of training can draw from it."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    set: str | None = None
    """Name of the feature set; `256px` for resolution 256."""

    _makes_a_table = field_validator("buckets")(require_table)

    @property
    def set_name(self) -> str:
        """The folder of the feature set in the dataset."""
        return self.set or f"{self.resolution_px}px"

    @property
    def table(self) -> tuple[Bucket, ...]:
        """The canvases, ordered by ratio: a table of one's own, or the reference's of the resolution."""
        if self.buckets is None:
            return bucket_table(self.resolution_px)
        return custom_table(self.buckets, self.resolution_px)


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
    """`auto`: bf16 on a GPU, fp32 on a CPU; what is stored is up to `codec`."""
    codec: Codec = "bf16"
    """How features are stored. `bf16`; `bf16-packed`: the same values in three quarters of the bytes; `int8`: in half
    of them, with an error of about 1% that is measured and recorded."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    set: str = Field(default="text", min_length=1)
    """Name of the feature set."""
