"""`pixart train`: train on features, from where the run was left."""

import contextlib
from pathlib import Path

from pixart_model import train as training
from pixart_model.checkpoint import latest
from pixart_model.config import Train
from pixart_model.dataset import open_dataset


def train(job: Train, dry_run: bool) -> None:
    """Train, or check that the features fit the model and print how much work there is."""
    if dry_run:
        with contextlib.closing(open_dataset(job.data, job.run.seed)) as dataset:
            dataset.require(job.model)
            dataset.null_caption()
            last = latest(Path(job.run.output))
            print(f"train: {'from ' + str(last) if last else 'from the beginning'}")
            epochs = " + ".join(f"{count:.1f}" for count in dataset.epochs(job.run.num_steps))
            print(
                f"train: {len(dataset):,} samples in {len(dataset) / job.data.batch_size:,.1f} batches an epoch, "
                f"{job.run.num_steps:,} steps ({epochs} epochs) -> {job.run.output}"
            )
            for quality in dataset.quality():
                print(f"train: {quality}")
        return
    print(f"checkpoint: {training.run(job)}")
