"""`pixart train`: train on features, from where the run was left."""

from pathlib import Path

from pixart_model import train as training
from pixart_model.checkpoint import latest
from pixart_model.config import Train
from pixart_model.dataset import open_dataset


def train(job: Train, dry_run: bool) -> None:
    """Train, or check that the features fit the model and print how much work there is."""
    if dry_run:
        dataset = open_dataset(job.data)
        dataset.require(job.model)
        last = latest(Path(job.run.output))
        print(f"train: {'from ' + str(last) if last else 'from the beginning'}")
        print(
            f"train: {len(dataset):,} samples in {dataset.num_batches:,} batches an epoch, {job.run.num_steps:,} steps "
            f"({job.run.num_steps / max(dataset.num_batches, 1):.1f} epochs) -> {job.run.output}"
        )
        dataset.close()
        return
    print(f"checkpoint: {training.run(job)}")
