import logging
from types import SimpleNamespace

import pytest

from pipelines import progress
from pipelines.progress import Progress


class Stderr:
    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""

    class Clock:
        now_s = 1000.0

        def monotonic(self):
            return self.now_s

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=Stderr(tty=True)))
    return progress.sys.stderr


@pytest.fixture
def lines(monkeypatch, caplog):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=Stderr(tty=False)))
    caplog.set_level(logging.INFO, logger="pipelines.progress")
    return lambda: [*caplog.messages]


def test_a_line_counts_what_is_committed_and_in_flight(clock, lines):
    shown = Progress("caption", num_units=10, num_done_before=4)
    clock.now_s += 10
    shown.unit_done(1000, 30)
    shown.live(500, 7)
    assert shown.line() == "caption 5/10 shards | 1,500 rows | 150.0 rows/s | 37 rejected | eta 30 s"


def test_workers_that_are_not_at_work_yet_are_counted(clock, lines):
    shown = Progress("caption", 2, 0)
    shown.live(0, 0, 3)
    assert shown.line().endswith("| 3 worker(s) starting")
    shown.live(0, 0, 0)
    assert "starting" not in shown.line()


def test_rows_in_flight_are_not_counted_twice_when_their_unit_is_done(clock, lines):
    shown = Progress("caption", 2, 0)
    clock.now_s += 1
    shown.live(100, 1)
    shown.unit_done(100, 1)
    assert "| 100 rows | 100.0 rows/s | 1 rejected |" in shown.line()


@pytest.mark.parametrize(
    ("num_units", "elapsed_s", "eta"),
    [(2, 30, "30 s"), (4, 30, "90 s"), (41, 30, "20 min"), (1001, 30, "8.3 h"), (1, 30, "0 s")],
)
def test_the_time_left_follows_the_pace_of_this_run(clock, lines, num_units, elapsed_s, eta):
    shown = Progress("stats", num_units, 0)
    clock.now_s += elapsed_s
    shown.unit_done(10, 0)
    assert shown.line().endswith(f"| eta {eta}")


def test_the_time_left_is_unknown_before_the_first_unit(clock, lines):
    shown = Progress("stats", 5, 3)
    clock.now_s += 30
    assert shown.line().endswith("eta ?")


def test_units_done_before_do_not_quicken_the_pace(clock, lines):
    shown = Progress("stats", 100, 98)
    clock.now_s += 60
    shown.unit_done(10, 0)
    assert shown.line().endswith("eta 60 s")


def test_empty_units_do_not_break_the_line(clock, lines):
    shown = Progress("stats", 3, 0)
    assert "| 0 rows | 0.0 rows/s |" in shown.line()
    shown.unit_done(0, 0)
    shown.live(7, 0)
    assert shown.line().startswith("stats 1/3 shards | 7 rows")


def test_a_terminal_gets_one_line_that_is_rewritten(clock, terminal):
    shown = Progress("caption", 2, 0)
    for _ in range(5):
        clock.now_s += 0.3
        shown.live(10, 0)
    shown.unit_done(20, 0)
    shown.unit_done(20, 0)
    shown.close()
    assert terminal.text.count("\r\x1b[K") == 6
    assert terminal.text.count("\n") == 1
    assert "caption 2/2 shards | 40 rows" in terminal.text.splitlines()[-1]


def test_a_terminal_is_not_written_to_more_than_five_times_a_second(clock, terminal):
    shown = Progress("caption", 2, 0)
    for _ in range(100):
        clock.now_s += 0.01
        shown.live(10, 0)
    assert terminal.text.count("\r") <= 5


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(clock, lines):
    shown = Progress("caption", 3, 0)
    for _ in range(25):
        clock.now_s += 1
        shown.live(10, 0)
    assert len(lines()) == 2
    for _ in range(3):
        shown.unit_done(20, 0)
    shown.close()
    assert len(lines()) == 3
    assert lines()[-1].startswith("caption 3/3 shards | 60 rows")
    assert progress.sys.stderr.text == ""


def test_nothing_done_leaves_a_terminal_alone(clock, terminal):
    Progress("caption", 2, 2).close()
    assert terminal.text == ""
