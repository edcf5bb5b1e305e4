"""The job files of `pixart train` and `pixart sample`.

Model sizes are functions that return a complete section: `pixart_xl_2()`, `pixart_b_2()`, `pixart_s_2()` and
`pixart_tiny()`. In a job file `size = "xl-2"` names one of them, and a number written beside it wins. Where the paper
(PixArt-alpha, arXiv:2310.00426) and its repository disagree, the default is the repository's and the docstring says so.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pixart_data.config import LocalPath, ModelId, Section
from pixart_data.sections import Device

Size = Literal["xl-2", "b-2", "s-2", "tiny"]
Precision = Literal["auto", "bf16", "fp32"]
Resolution = Literal[256, 512, 1024]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_RATIO = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


class Model(Section):
    """The PixArt transformer, complete: nothing about it is decided elsewhere."""

    size: Size = "xl-2"
    """Where the numbers that are not given come from."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    width: int = Field(ge=4)
    """Channels of a token; a multiple of `heads` and of 4, and of 3 with micro-conditioning."""
    heads: int = Field(ge=1)
    """Attention heads of a block."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden channels of a block's MLP over `width`."""
    patch: int = Field(default=2, ge=1)
    """Side of a token in latent cells."""
    in_channels: int = Field(default=4, ge=1)
    """Latent channels of the VAE; the model returns twice as many: noise and variance."""
    caption_width: int = Field(default=4096, ge=1)
    """Width of the text encoder: 4096 for T5-XXL."""
    base_size: int = Field(default=32, ge=1)
    """Side in latent cells of the square that positions are measured on: 32 for 256 px, 64 for 512, 128 for 1024."""
    interpolation_scale: float = Field(default=1.0, gt=0)
    """Divides the positions (the reference's `lewei_scale`): 1 for 256 and 512 px, 2 for 1024."""
    micro_conditioning: bool = False
    """Condition on the original size and the aspect ratio, as the reference's multi-scale models do."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, given: Any) -> Any:
        if not isinstance(given, dict) or {"depth", "width", "heads"} <= given.keys():
            return given
        name = given.get("size", "xl-2")
        return {**SIZES[name]().model_dump(), **given} if name in SIZES else given

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for divisor, what in ((self.heads, "heads"), (4, "4, for positions in two axes")):
            if self.width % divisor:
                raise ValueError(f"width: expected a multiple of {divisor} ({what}), got {self.width}")
        if self.micro_conditioning and self.width % 3:
            raise ValueError(f"width: micro_conditioning needs a multiple of 3, got {self.width}")
        if self.base_size % self.patch:
            raise ValueError(f"base_size: expected a multiple of patch ({self.patch}), got {self.base_size}")
        return self


def pixart_xl_2() -> Model:
    """Return PixArt-XL/2, the paper's model: 610,856,096 parameters."""
    return Model(size="xl-2", depth=28, width=1152, heads=16)


def pixart_b_2() -> Model:
    """Return the size of DiT-B/2 (arXiv:2212.09748)."""
    return Model(size="b-2", depth=12, width=768, heads=12)


def pixart_s_2() -> Model:
    """Return the size of DiT-S/2 (arXiv:2212.09748)."""
    return Model(size="s-2", depth=12, width=384, heads=6)


def pixart_tiny() -> Model:
    """Return a model that trains on a laptop's CPU, for tests and demonstrations."""
    return Model(size="tiny", depth=2, width=96, heads=4)


SIZES = {"xl-2": pixart_xl_2, "b-2": pixart_b_2, "s-2": pixart_s_2, "tiny": pixart_tiny}


class Mixed(Section):
    """One more dataset to train on, with sets of the same names."""

    features: LocalPath
    """The dataset."""
    weight: Weight = 1.0
    """How many of the batches come from it, in proportion to the other weights."""


class Data(Section):
    """The features to train on, as `pixart extract` wrote them."""

    features: LocalPath
    """The dataset: a folder that holds the image set and the text set."""
    weight: Weight = 1.0
    """With `mix`: how many of the batches come from `features`, in proportion to the other weights."""
    mix: list[Mixed] = []
    """Further datasets, of the same encoders, resolution and buckets; every batch comes from one of them."""
    image_set: str = "256px"
    """Name of the image feature set in it."""
    text_set: str = "text"
    """Name of the text feature set in it."""
    text_mix: dict[str, Weight] = {}
    """Several text sets and how often each is drawn from, e.g. `{ text = 0.7, text-short = 0.2, text-raw = 0.1 }`, in
    place of `text_set`. Each epoch draws anew; a sample that a set lacks is drawn from the others."""
    where: str | None = None
    """Train on the samples whose row in the image set's index matches, e.g.
    `min(original_height_px, original_width_px) >= 512 and bucket in ("1.00", "0.75")`; unset, all of them."""
    scores: LocalPath | None = None
    """A Parquet table with a column `key` and further ones, which `where` may name too, e.g. `aesthetic > 5.5`. What
    a sample without a row there is compared with is neither true nor false."""
    batch_size: int = Field(default=32, ge=1)
    """Samples in a step. The reference trains 256 px with 176 on each of 64 GPUs; the paper says 178."""
    drop_caption: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the null caption, for classifier-free guidance."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples that are read mirrored; needs an image set made with `image.flips`."""
    damaged: Literal["fail", "skip"] = "fail"
    """What to do about samples whose bytes are damaged or missing: stop and name the first, or take another of the same
    batch in its place, count it in `metrics.jsonl` and name it in the log."""
    run_length: int | None = Field(default=None, ge=1)
    """Neighbours in storage that are read one after the other; unset, 1 on a disk and 8 from an object store. More
    reads longer pieces and shuffles less."""
    block_rows: int = Field(default=65_536, ge=1)
    """About how many samples of a bucket are shuffled among each other, at least; blocks come in random order too."""
    num_threads: int = Field(default=2, ge=1)
    """Threads that read batches ahead."""
    num_prefetch: int = Field(default=4, ge=1)
    """Batches read ahead."""
    cache_dir: LocalPath | None = None
    """Folder on a local disk for what can be made again: which text belongs to which image, and what was read from an
    object store. Unset, `pixart-toolkit` in `$XDG_CACHE_HOME` or `~/.cache`."""
    cache_bytes: int = Field(default=64 << 30, ge=0)
    """What the samples that were read from an object store may take in it; those used longest ago make room. 0 keeps
    none: enough where the dataset is much larger than the disk, and then each epoch fetches all of it."""

    @property
    def texts(self) -> dict[str, float]:
        """The text sets and their weights; one set without a mix."""
        return self.text_mix or {self.text_set: 1.0}

    @model_validator(mode="after")
    def _scores_are_used(self) -> Self:
        if self.scores is not None and self.where is None:
            raise ValueError("scores: expected a query that uses them, found none; set where")
        return self


class Optim(Section):
    """AdamW, a warm-up to a constant learning rate, and the moving average of the weights."""

    lr: float = Field(default=2e-5, gt=0)
    """Used as written, like the paper's; the repository multiplies its 2e-5 by sqrt(global batch / 256)."""
    weight_decay: float = Field(default=0.03, ge=0)
    """On every parameter. The repository's value; the paper says 0.05."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the gradient's mean."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the gradient's square."""
    eps: float = Field(default=1e-10, gt=0)
    """The repository's value; the paper gives none."""
    clip_grad_norm: float = Field(default=0.01, gt=0)
    """Gradients are scaled down to this norm. The repository's value; the paper gives none."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of linear warm-up. The repository's value; the paper only says that the rate is constant."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Of the moving average of the weights, which sampling uses by default."""


class Run(Section):
    """One training run: its directory, its length and its machine."""

    output: LocalPath
    """The run's directory, e.g. `runs/NAME`; the same command on it continues the run."""
    num_steps: int = Field(ge=1)
    """Optimizer steps in all, those before a restart included."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial weights, the order of samples and the noise of every step."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two lines of `metrics.jsonl`."""
    save_every: int = Field(default=2000, ge=1)
    """Steps between two checkpoints; the last step is always one."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints kept; older ones are deleted."""
    dtype: Precision = "auto"
    """Of the arithmetic; weights and optimizer stay fp32. `auto`: bf16 on a GPU, fp32 on a CPU."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    grad_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


class Grid(Section):
    """Pictures drawn from the moving average at every checkpoint, for captions of the dataset."""

    num_images: int = Field(default=0, ge=0)
    """0 draws none."""
    num_steps: int = Field(default=20, ge=1)
    """Steps of DPM-Solver++."""
    guidance: float = Field(default=4.5, ge=1)
    """Scale of classifier-free guidance; 1 is none."""
    vae: ModelId | None = None
    """Decodes the latents; unset, the model that the image set's manifest names."""


class Train(Section):
    """The job of `pixart train`."""

    model: Model = Field(default_factory=pixart_xl_2)
    data: Data
    optim: Optim = Optim()
    run: Run
    grid: Grid = Grid()


class Sample(Section):
    """The job of `pixart sample`."""

    checkpoint: LocalPath
    """A checkpoint, or a run's directory for its last one."""
    prompts: list[str] = []
    """What to draw."""
    prompts_file: LocalPath | None = None
    """A text file with one more prompt in each line."""
    output: LocalPath
    """Folder for the images."""
    guidance: float = Field(default=4.5, ge=1)
    """Scale of classifier-free guidance; 1 is none."""
    num_steps: int = Field(default=20, ge=1)
    """Steps of DPM-Solver++."""
    seed: int = Field(default=0, ge=0)
    """Of the first image; image i is drawn with seed + i, whatever the batch size."""
    aspect_ratio: str = "1:1"
    """Height to width, like the reference's `--ar`: `3:4` is wide, `4:3` tall; the nearest bucket is taken."""
    resolution_px: Resolution | None = None
    """Side of the square canvas with the same area; unset, the one that the model was trained on."""
    text_encoder: ModelId | None = None
    """Unset, the encoder that made the training features; a copy of it in a folder can stand in."""
    text_encoder_subfolder: str | None = None
    """Folder of the encoder inside `text_encoder`; read only when that is set."""
    tokenizer_subfolder: str | None = None
    """Folder of the tokenizer inside `text_encoder`; read only when that is set."""
    vae: ModelId | None = None
    """Unset, the model that made the training features."""
    vae_subfolder: str | None = None
    """Folder of the model inside `vae`; read only when that is set."""
    use_ema: bool = True
    """Draw with the moving average of the weights."""
    dtype: Precision = "auto"
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    batch_size: int = Field(default=8, ge=1)
    """Images drawn at once; the images do not depend on it."""

    @model_validator(mode="after")
    def _draws_something(self) -> Self:
        if not self.prompts and self.prompts_file is None:
            raise ValueError('prompts: expected at least one, found none; add --prompt "..." or a prompts_file')
        self.height_over_width  # noqa: B018 - complains
        return self

    @property
    def height_over_width(self) -> float:
        """The aspect ratio as a number.

        Raises:
            ValueError: If it is not two positive numbers with a colon between them.
        """
        match = _RATIO.fullmatch(self.aspect_ratio.strip())
        height, width = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
        if height <= 0 or width <= 0:
            raise ValueError(f"aspect_ratio: expected height:width, e.g. 3:4, got {self.aspect_ratio!r}")
        return height / width
