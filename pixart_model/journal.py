"""`metrics.jsonl`: what a run wrote of itself, one JSON object in each line, in the order of its steps.

Beside it `spent.json`: what steps cost whose lines are gone, since a run that was killed does them again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_data.errors import DataError
from pixart_data.retries import storage
from pixart_data.storage import exists, read_bytes, write_atomic

METRICS, SPENT = "metrics.jsonl", "spent.json"

Line = dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """The file of a run's directory."""

    run_dir: Path

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        return self.run_dir / METRICS

    def lines(self) -> list[Line]:
        """Return what is written so far; a last line that a kill has cut short is left out.

        Raises:
            DataError: If the file is not one of metrics.
        """
        if not exists(self.path):
            return []
        try:
            whole = [text for text in read_bytes(self.path).decode().splitlines(keepends=True) if text.endswith("\n")]
            lines = [json.loads(text) for text in whole]
            _ = [line["step"] for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: not a file of metrics ({error}); move it away and run again") from error
        return lines

    def keep(self, lines: list[Line]) -> None:
        """Replace the file, if there is one, by these lines; raises JobError if the storage fails."""
        if exists(self.path):
            write_atomic(self.path, "".join(map(_text, lines)).encode())

    def carried(self) -> Line:
        """Return what was noted with `carry`; nothing where it cannot be read, for no run may stop for that."""
        path = self.run_dir / SPENT
        try:
            found = json.loads(read_bytes(path)) if exists(path) else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def carry(self, spent: Line) -> None:
        """Note what was spent up to now, lines that are dropped included; raises JobError if the storage fails."""
        write_atomic(self.run_dir / SPENT, _text(spent).encode())

    def append(self, line: Line) -> None:
        """Write one more line; raises JobError if the storage fails."""
        with storage(self.path), self.path.open("a") as file:
            file.write(_text(line))


def _text(line: Line) -> str:
    return json.dumps(line) + "\n"
