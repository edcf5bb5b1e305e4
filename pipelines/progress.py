"""What is shown while units are worked on: one line with shards, rows, rate, rejected rows and the time left."""

import logging
import sys
import time

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0


class Progress:
    """Counts rows and shows a line: rewritten in place on a terminal, logged every ten seconds elsewhere."""

    def __init__(self, stage: str, num_units: int, num_done_before: int) -> None:
        self.stage, self.num_units, self.num_done = stage, num_units, num_done_before
        self.num_worked = 0
        self.rows = self.rejected = 0
        self._live = (0, 0)
        self._num_waiting = 0
        self._in_place = sys.stderr.isatty()
        self._started_s = self._shown_s = time.monotonic()

    def unit_done(self, rows: int, rejected: int) -> None:
        """Count a committed unit."""
        self.num_done += 1
        self.num_worked += 1
        self.rows += rows
        self.rejected += rejected
        self._live = (0, 0)  # counted now, and counted anew with the next poll
        self._show(force=not self._in_place and self.num_done == self.num_units)

    def live(self, rows: int, rejected: int, num_waiting: int = 0) -> None:
        """Tell how many rows the units in flight have behind them, and how many workers are not at work yet."""
        self._live = (rows, rejected)
        self._num_waiting = num_waiting
        self._show()

    def close(self) -> None:
        """End the line on a terminal."""
        if self._in_place and self.num_worked:
            self._show(force=True)
            sys.stderr.write("\n")

    def line(self) -> str:
        """Return the line as it stands."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        rows, rejected = self.rows + self._live[0], self.rejected + self._live[1]
        return (
            f"{self.stage} {self.num_done}/{self.num_units} shards | {rows:,} rows | "
            f"{rows / elapsed_s:.1f} rows/s | {rejected:,} rejected | eta {self._eta(elapsed_s)}"
            + (f" | {self._num_waiting} worker(s) starting" if self._num_waiting else "")
        )

    def _eta(self, elapsed_s: float) -> str:
        left = self.num_units - self.num_done
        if not left:
            return "0 s"
        if not self.num_worked:
            return "?"
        worked = self.num_worked + self._live[0] / max(self.rows / self.num_worked, 1.0)
        seconds = elapsed_s / worked * max(self.num_units - self.num_done - (worked - self.num_worked), 0.0)
        if seconds < 120:
            return f"{seconds:.0f} s"
        return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

    def _show(self, force: bool = False) -> None:
        now_s = time.monotonic()
        if not force and now_s - self._shown_s < (0.2 if self._in_place else _LINE_EVERY_S):
            return
        self._shown_s = now_s
        if self._in_place:
            sys.stderr.write(f"\r\x1b[K{self.line()}")
            sys.stderr.flush()
        else:
            log.info("%s", self.line())
