"""The job files of `pixart train` and `pixart sample`.

Where the paper (PixArt-alpha, arXiv:2310.00426) and its repository disagree, the default is the paper's, and the
docstring says what the repository has. What the paper does not give is the repository's.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pixart_data.config import LocalPath, ModelId, Section
from pixart_data.sections import Device
from pixart_model.sizes import Model, pixart_xl_2

Precision = Literal["auto", "bf16", "fp32"]
Resolution = Literal[256, 512, 1024]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_RATIO = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


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
    """Samples that go through the model at once on one GPU, all of one bucket. The paper has 178 at 256 px, the
    repository 176."""
    batches_per_step: int = Field(default=1, ge=1)
    """Batches in an optimizer step, over all GPUs: a multiple of their number, and what is more than one for each GPU
    is accumulated. It belongs to the run, not to the machines: with more or fewer GPUs the same samples are in the same
    step. The paper has 64."""
    small_buckets: Literal["fail", "carry"] = "fail"
    """What to do about a bucket with fewer samples than a batch: stop and name it, or let its batches hold a sample
    more than once, as rarely as its size asks for."""
    labels: LocalPath | None = None
    """With `model.condition = "class"`: a Parquet table with columns `key` and `label` (0 to `num_classes` - 1). Unset,
    the class is the folder that an image lies in, and folders count in alphabetical order, as ImageNet's do."""
    classes: LocalPath | None = None
    """With folders as classes: a text file with the name of one in each line, where not all of them are there."""
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
    weight_decay: float = Field(default=0.05, ge=0)
    """On every parameter. The paper's value; the repository has 0.03."""
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
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weigh the error of the noise by min(SNR, gamma) / SNR (arXiv:2303.09556; 5 there); unset, all timesteps alike, as
    in the paper."""


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
    """Of the arithmetic; weights and optimizer stay fp32. `auto`: bf16 on a GPU that has it (since A100), else fp32."""
    device: Device = "auto"
    """`auto`: a GPU if there is one."""
    grad_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the blocks with `torch.compile`: faster on a GPU after a minute or two, of no use on a CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each holds all weights (DDP), or a share of weights, averages and optimizer (FSDP2)."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that Ray Train starts on the Ray cluster, each with a GPU; 0: this process, or those of `torchrun`."""
    log_keys: bool = False
    """Write the keys of every step to `keys.jsonl` of the run's directory: large."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into `tensorboard/` of the run's directory."""
    wandb_project: str | None = None
    """Send the metrics to this project of Weights & Biases too."""


class Init(Section):
    """What a new run starts from; a run that goes on starts from its own last checkpoint."""

    weights: ModelId | None = None
    """A checkpoint or a run of `pixart train`, a `.pth` of PixArt, a `.pt` of DiT, or a folder or hub id of diffusers'
    `PixArtTransformer2DModel`; unset, weights are drawn anew. DiT's become PixArt's by the paper's
    re-parameterisation."""
    use_ema: bool = True
    """Take the moving average of the weights, where there is one."""
    shared_mlp: Literal["mean", "first"] = "mean"
    """Of DiT: the one modulation MLP is the mean of the blocks' (nearest to all of them at every timestep), or the
    first block's."""
    without_class: Literal["zero", "null", "mean"] = "zero"
    """Of DiT: what stands for a class: nothing, the vector of no class, or the mean of all classes."""
    null_caption: Literal["empty", "reference"] = "empty"
    """What replaces a dropped caption: the features of the empty caption at their own length, or, of a `.pth` of
    PixArt-alpha, its learned table at the length of the caption that it replaces."""
    other_features: bool = False
    """Start from weights that were trained on features of another VAE or text encoder, to adapt them."""


class Grid(Section):
    """Pictures drawn from the moving average, always for the same prompts and seeds."""

    num_images: int = Field(default=0, ge=0)
    """0 draws none; unset, one for each of `prompts`. Of more than there are prompts, the others are captions of the
    dataset; with `model.condition = "class"`, they are of classes spread evenly."""
    prompts: list[str] = []
    """What to draw; the text encoder of the features encodes them once, when the run starts."""
    every: int | None = Field(default=None, ge=1)
    """Steps between two grids; unset, one at every checkpoint."""
    num_steps: int = Field(default=20, ge=1)
    """Steps of DPM-Solver++."""
    guidance: float = Field(default=4.5, ge=1)
    """Scale of classifier-free guidance; 1 is none."""
    vae: ModelId | None = None
    """Decodes the latents; unset, the model that the image set's manifest names."""

    @model_validator(mode="before")
    @classmethod
    def _one_for_each_prompt(cls, given: Any) -> Any:
        if isinstance(given, dict) and "num_images" not in given and isinstance(given.get("prompts"), list):
            return {**given, "num_images": len(given["prompts"])}
        return given

    @model_validator(mode="after")
    def _draws_each_prompt(self) -> Self:
        if self.num_images and len(self.prompts) > self.num_images:
            raise ValueError(
                f"num_images: expected at least {len(self.prompts)}, one for each prompt, or 0 for none, got "
                f"{self.num_images}; leave it out, or some prompts"
            )
        return self


class Cost(Section):
    """What a GPU-hour is taken to cost; the defaults are those of the paper's A100s."""

    dollars_per_gpu_hour: float = Field(default=1.57, ge=0)
    """The paper's $28,400 for 753 days."""
    watts_per_gpu: float = Field(default=400.0, ge=0)
    """An A100's; add the share of the host and of cooling if you know them."""
    kg_co2_per_kwh: float = Field(default=0.4, ge=0)
    """Of the grid."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense bf16 TFLOP/s of a GPU, which utilisation is measured against; unset, known by the GPU's name."""


class Train(Section):
    """The job of `pixart train`."""

    model: Model = Field(default_factory=pixart_xl_2)
    init: Init = Init()
    data: Data
    optim: Optim = Optim()
    run: Run
    grid: Grid = Grid()
    cost: Cost = Cost()


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
