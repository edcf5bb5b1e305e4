"""`keys.jsonl`: which samples each step was trained on, for who wants to look, with `run.log_keys`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pixart_data.retries import storage
from pixart_model.batches import Names
from pixart_model.config import Train
from pixart_model.parallel import World

KEYS = "keys.jsonl"
_STEP = re.compile(rb'\{"step": (\d+), .*\}\n')


class Trace:
    """Writes the keys of all processes; each makes one and asks the same of it. Without `run.log_keys` it does nothing.

    Lines of steps that this run will repeat, which one that was cut short wrote, are dropped.

    Args:
        run_dir: Where `keys.jsonl` is.
        job: Of the run.
        world: Where this process stands among all.
        step: Steps done before.

    Raises:
        JobError: If the storage fails.
    """

    def __init__(self, run_dir: Path, job: Train, world: World, step: int) -> None:
        self._path, self._world, self._num_batches = run_dir / KEYS, world, job.data.batches_per_step
        self._writes = job.run.log_keys
        if self._writes:
            with world.agreed():
                if world.is_first:
                    _rewind(self._path, step)

    def add(self, step: int, names: Sequence[Names]) -> None:
        """Write the keys of a step, by the number of the batch in the global order, however many processes there are.

        Args:
            step: Counted from 1.
            names: Of the batches of this process.

        Raises:
            JobError: If the storage fails.
        """
        if not self._writes:
            return
        everyone = self._world.gather([one.keys() for one in names])  # by process, batch of it, sample
        with self._world.agreed():
            if self._world.is_first:
                keys = [own for batches in zip(*everyone, strict=True) for own in batches]
                line = {"step": step, "batch": (step - 1) * self._num_batches, "keys": keys}
                with storage(self._path), self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def _rewind(path: Path, step: int) -> None:
    """Cut a file off before the first line of a later step, or the one that a kill has cut short."""
    with storage(path), path.open("a+b") as file:
        file.seek(0)
        end = 0
        for line in file:  # one by one: of a month they are more than fits into memory
            found = _STEP.fullmatch(line)
            if found is None or int(found[1]) > step:
                break
            end += len(line)
        file.truncate(end)
