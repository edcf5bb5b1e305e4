"""`pixart train`: train on features, from where the run was left."""

import contextlib
import os
from pathlib import Path

from jobs import ranks, rehearsal
from jobs.prompts import encode_prompts
from jobs.submit import show_token
from pixart_data.errors import ConfigError
from pixart_model import checkpoint, trackers
from pixart_model import train as training
from pixart_model.config import Train
from pixart_model.dataset import open_dataset


def train(job: Train, dry_run: bool) -> None:
    """Train, or check that the features fit the model and print how much work there is, and what it costs."""
    if dry_run:
        rehearse(job)
        return
    encode_prompts(job)
    last = _launch(job) if job.run.num_workers else training.run(job)
    if ranks.is_first():
        print(f"checkpoint: {last}")


def _launch(job: Train) -> Path:
    if os.environ.get("RAY_ADDRESS"):
        show_token()
    try:
        from jobs.workers import launch
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "run.num_workers: expected Ray, which starts the workers, found none installed; "
            "pip install 'pixart-toolkit[data]', or leave the key out and type torchrun --no-python pixart train"
        ) from error
    return launch(job)


def rehearse(job: Train) -> None:
    """Do everything that comes before the first step and writes nothing, and print the arithmetic of the job.

    Of several processes the first one does it.

    Raises:
        ConfigError: What training would refuse to begin, or to go on, with; likewise DataError.
    """
    if not ranks.is_first():
        return
    training.require_shares(job, job.run.num_workers or int(os.environ.get("WORLD_SIZE", "1")))
    trackers.require(job.run)
    classes = job.model.num_classes if job.model.condition == "class" else None
    with contextlib.closing(open_dataset(job.data, job.run.seed, classes)) as dataset:
        dataset.require(job.model)
        last = checkpoint.latest(Path(job.run.output))
        done = 0 if last is None else training.steps_done(job, dataset, last)
        if done >= job.run.num_steps:
            print(f"train: {training.finished(job, done)}")
            return
        rehearsal.require_begins(job, dataset, last)
        if job.grid.num_images:
            rehearsal.require_drawable(job, dataset)
        for line in rehearsal.lines(job, dataset, last, done):
            print(f"train: {line}")
