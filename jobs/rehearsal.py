"""What `pixart train --dry-run` prints: how much work there is, and what it will cost."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from jobs import prompts
from pixart_model import beginnings, checkpoint, costs, grid
from pixart_model.config import Train
from pixart_model.dataset import Dataset
from pixart_model.flops import A100_TFLOPS, image_tokens, peak_tflops, train_flops
from pixart_model.networks import build
from pixart_model.train import slow_average

_MOST_LOOKED_AT = 65_536  # captions, for their mean length


def require_begins(job: Train, dataset: Dataset, last: Path | None) -> None:
    """Check that a run can begin with what it is told to, or go on from its last checkpoint.

    Weights are read, and brought to a model that takes no memory.

    Raises:
        ConfigError: If they are of another size, kind, or encoders than the job's.
        DataError: If they, or the null caption, are damaged or missing.
    """
    null = None
    if last is None:
        with torch.device("meta"):
            model = build(job.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # that is the point
            null = beginnings.begin(job.init, model, dataset.facts())
    elif job.model.condition == "caption":
        null = checkpoint.load_null_caption(last)
    if null is None and job.model.condition == "caption":
        dataset.null_caption()


def require_drawable(job: Train, dataset: Dataset) -> None:
    """Check that the grid can be drawn: its packages, its VAE, and the encoder of prompts that are not encoded yet.

    Raises:
        ConfigError: If something is not there, naming the key.
        DataError: If the text set is damaged.
    """
    grid.require_packages()
    grid.load_vae(job.grid.vae, dataset.images.manifest.model)
    prompts.unencoded(job)


def lines(job: Train, dataset: Dataset, last: Path | None, done: int) -> Iterator[str]:
    """Yield the arithmetic of a job on its dataset, a line at a time.

    Args:
        job: The job.
        dataset: Opened.
        last: The checkpoint that it goes on from, if it does.
        done: Steps of that.
    """
    data, steps = job.data, job.run.num_steps
    yield _beginning(job, last)
    epochs = " + ".join(f"{count:.1f}" for count in dataset.epochs(steps * data.batches_per_step))
    yield (
        f"{len(dataset):,} samples in {len(dataset) / data.batch_size:,.1f} batches an epoch, "
        f"{steps:,} steps ({epochs} epochs) -> {job.run.output}"
    )
    for quality in dataset.quality():
        yield str(quality)
    yield (
        f"{num_parameters(job):,} parameters; a step is {data.batches_per_step} x {data.batch_size} = "
        f"{costs.global_batch(job):,} samples, all steps {costs.samples_seen(job):,}"
    )
    bucket = dataset.commonest_bucket()
    yield from cost_lines(
        job, image_tokens(job.model, bucket.height_px, bucket.width_px), mean_text_tokens(job, dataset), done
    )
    yield from slow_average(job)


def cost_lines(job: Train, num_image_tokens: int, num_text_tokens: float, done: int = 0) -> Iterator[str]:
    """Yield what a job will cost from here on.

    Args:
        job: The job.
        num_image_tokens: Of a sample.
        num_text_tokens: Of a sample, on average.
        done: Steps that are done.
    """
    per_1000 = 1000, num_image_tokens, round(1000 * num_text_tokens)
    tflop, with_recomputation = (
        train_flops(job.model, *per_1000, grad_checkpointing=again) / 1e15
        for again in (False, job.run.grad_checkpointing)
    )
    again = f", {with_recomputation:.3g} with run.grad_checkpointing" if job.run.grad_checkpointing else ""
    text = f" and {num_text_tokens:.1f} of text" if job.model.condition == "caption" else ""
    samples = costs.samples_seen(job) - done * costs.global_batch(job)
    what = f"for the {job.run.num_steps - done:,} steps that are left" if done else "in all"
    yield (
        f"{tflop:.3g} TFLOP a sample, forward and backward{again}, of {num_image_tokens:,} image tokens{text}; "
        f"{tflop * samples:.3g} {what}"
    )
    peak, whose = _peak(job)
    spent = costs.estimate(samples, with_recomputation, peak, job.cost)
    yield f"at {costs.UTILISATION:.0%} of the {peak:.4g} TFLOP/s of {whose}, about {spent.text()}"


def num_parameters(job: Train) -> int:
    """Return the parameters of the model, without making room for them."""
    with torch.device("meta"):
        model = build(job.model)
    return sum(parameter.numel() for parameter in model.parameters())


def mean_text_tokens(job: Train, dataset: Dataset) -> float:
    """Return the mean length of the captions that the model is given, dropped ones included; 0 of classes.

    Text sets count by their share in the mix and the samples that they hold, datasets by their weight.
    """
    if job.model.condition == "class":
        return 0.0
    means, weights = [], []
    for portion, weight in zip(dataset.portions, (job.data.weight, *(one.weight for one in job.data.mix)), strict=True):
        held = [share * count for share, count in portion.shares().values()]
        for texts, part in zip(portion.mixture.sets, held, strict=True):
            some = texts.entries[:: max(1, len(texts.entries) // _MOST_LOOKED_AT)]["num_tokens"]
            means.append(float(some.mean()))
            weights.append(weight * part / sum(held))
    drop = job.data.drop_caption
    return (1 - drop) * float(np.average(means, weights=weights)) + drop * len(dataset.null_caption())


def _beginning(job: Train, last: Path | None) -> str:
    if last is not None:
        return f"from {last}"
    return f"from {job.init.weights}" if job.init.weights else "from the beginning"


def _peak(job: Train) -> tuple[float, str]:
    """Return the TFLOP/s to reckon with, and whose they are."""
    if job.cost.peak_tflops is not None:
        return job.cost.peak_tflops, "a GPU (cost.peak_tflops)"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = peak_tflops(name)
    if known is not None:
        return known, f"this machine's {name}"
    if name:
        return A100_TFLOPS, f"an A100 (that of this machine's {name} is not known: set cost.peak_tflops)"
    return A100_TFLOPS, "an A100 (set cost.peak_tflops for another GPU)"
