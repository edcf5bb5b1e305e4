"""What `pixart train --dry-run` prints: how much work there is, and what it will cost."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pixart_model import costs
from pixart_model.checkpoint import latest
from pixart_model.config import Train
from pixart_model.dataset import Dataset
from pixart_model.flops import A100_TFLOPS, image_tokens, peak_tflops, train_flops
from pixart_model.networks import build

_MOST_LOOKED_AT = 65_536  # captions, for their mean length


def lines(job: Train, dataset: Dataset) -> Iterator[str]:
    """Yield the arithmetic of a job on its dataset, a line at a time."""
    data, steps = job.data, job.run.num_steps
    yield _beginning(job)
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
        job, image_tokens(job.model, bucket.height_px, bucket.width_px), mean_text_tokens(job, dataset)
    )


def cost_lines(job: Train, num_image_tokens: int, num_text_tokens: float) -> Iterator[str]:
    """Yield what a job will cost.

    Args:
        job: The job.
        num_image_tokens: Of a sample.
        num_text_tokens: Of a sample, on average.
    """
    per_1000 = 1000, num_image_tokens, round(1000 * num_text_tokens)
    tflop, with_recomputation = (
        train_flops(job.model, *per_1000, grad_checkpointing=again) / 1e15
        for again in (False, job.run.grad_checkpointing)
    )
    again = f", {with_recomputation:.3g} with run.grad_checkpointing" if job.run.grad_checkpointing else ""
    text = f" and {num_text_tokens:.1f} of text" if job.model.condition == "caption" else ""
    samples = costs.samples_seen(job)
    yield (
        f"{tflop:.3g} TFLOP a sample, forward and backward{again}, of {num_image_tokens:,} image tokens{text}; "
        f"{tflop * samples:.3g} in all"
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
    """Return the mean length of the captions that the model is given, dropped ones included; 0 of classes."""
    if job.model.condition == "class":
        return 0.0
    entries = dataset.mixture.main.entries
    some = entries[:: max(1, len(entries) // _MOST_LOOKED_AT)]["num_tokens"]
    drop = job.data.drop_caption
    return (1 - drop) * float(some.mean()) + drop * len(dataset.null_caption())


def _beginning(job: Train) -> str:
    last = latest(Path(job.run.output))
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
    return A100_TFLOPS, "an A100 (set cost.peak_tflops for another GPU)"
