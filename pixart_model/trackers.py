"""Programs that draw the curves of a run: TensorBoard and Weights & Biases, each where it is asked for and installed.

What they show is in `metrics.jsonl` as well, so none of them may stop a run: one that fails is told of once and left.
"""

import importlib
import importlib.util
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pixart_data.errors import ConfigError
from pixart_data.storage import write_atomic
from pixart_model.config import Run, Train

TENSORBOARD = "tensorboard"
WANDB_ID = "wandb.id"
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What is told of a run while it goes on."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the numbers of a line of `metrics.jsonl`."""

    def picture(self, step: int, path: Path) -> None:
        """Take a grid that was drawn, a PNG."""

    def close(self) -> None:
        """Wait until everything is written."""


def require(run: Run) -> None:
    """Check that what a job asks for is installed.

    Raises:
        ConfigError: Naming the package.
    """
    wanted = {"tensorboard": ("tensorboard", run.tensorboard), "wandb_project": ("wandb", bool(run.wandb_project))}
    for key, (package, is_wanted) in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.{key}: expected the package {package}, found that it is not installed; pip install {package}, or "
                f"leave the key out: the same figures are in metrics.jsonl"
            )


class Trackers:
    """All that a job asks for, none of which can stop it.

    Args:
        job: Of the run.
        run_dir: The run's directory.
        step: Steps done: what was told of later ones is to be forgotten.
    """

    def __init__(self, job: Train, run_dir: Path, step: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name, make in _wanted(job, run_dir, step):
            self._try(name, lambda name=name, make=make: self._open.__setitem__(name, make()))  # type: ignore[misc]

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell them the numbers of a line."""
        self._all(lambda tracker: tracker.figures(step, figures))

    def picture(self, step: int, path: Path) -> None:
        """Tell them of a grid."""
        self._all(lambda tracker: tracker.picture(step, path))

    def close(self) -> None:
        """Have them finish."""
        self._all(lambda tracker: tracker.close())
        self._open.clear()

    def _all(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tell(tracker))  # type: ignore[misc]

    def _try(self, name: str, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in them, training goes on
            self._open.pop(name, None)
            why = str(error).partition("\n")[0] or type(error).__name__
            _log.warning("%s: failed (%s); the run goes on without it, its figures are in metrics.jsonl", name, why)


class TensorBoard:
    """Writes event files, a folder of them for each run."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:  # noqa: D102
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, path: Path) -> None:  # noqa: D102
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image("grid", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:  # noqa: D102
        self._writer.close()


class Wandb:
    """Sends everything to Weights & Biases, or keeps it for later where `WANDB_MODE=offline` says so.

    A run that goes on is the same run there; its id is kept in the run's directory.
    """

    def __init__(self, job: Train, run_dir: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        file = run_dir / WANDB_ID
        if not file.exists():
            write_atomic(file, secrets.token_hex(4).encode())
        self._wandb = wandb
        self._run: Any = wandb.init(
            project=job.run.wandb_project,
            id=file.read_text().strip(),
            name=run_dir.name,
            dir=str(run_dir),
            config=job.model_dump(exclude_none=True),
            resume="allow",
        )
        # Its own count of steps cannot go back, and a run that was killed goes back to its last checkpoint.
        self._run.define_metric("*", step_metric="step")

    def figures(self, step: int, figures: Mapping[str, float]) -> None:  # noqa: D102
        self._run.log({**figures, "step": step})

    def picture(self, step: int, path: Path) -> None:  # noqa: D102
        self._run.log({"grid": self._wandb.Image(str(path)), "step": step})

    def close(self) -> None:  # noqa: D102
        self._run.finish()


def _wanted(job: Train, run_dir: Path, step: int) -> Iterator[tuple[str, Callable[[], Tracker]]]:
    if job.run.tensorboard:
        yield "tensorboard", lambda: TensorBoard(run_dir / TENSORBOARD, step)
    if job.run.wandb_project:
        yield "wandb", lambda: Wandb(job, run_dir)
