import json
import logging
import os
import threading
import time
from types import SimpleNamespace

import pytest

from pipelines import progress
from pipelines.progress import Progress, RunFacts, Timing
from pixart_data.commits import Record, sweep, write_record
from pixart_data.errors import JobError
from pixart_data.runs import STATUS_FILE, SUMMARY_FILE, read_status


class Stderr:
    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time that passes when a test says so."""

    class Clock:
        now_s = 1000.0

        def monotonic(self):
            return self.now_s

        def time(self):
            return 1_700_000_000.0 + self.now_s

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=Stderr(tty=True), platform="linux"))
    return progress.sys.stderr


@pytest.fixture
def lines(monkeypatch, caplog):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=Stderr(tty=False), platform="linux"))
    caplog.set_level(logging.INFO, logger="pipelines.progress")
    return lambda: [*caplog.messages]


@pytest.fixture
def begin(tmp_path):
    """Start a run, after `num_done` units of a hundred rows that earlier runs have done."""

    def start(num_units, num_done=0, stage="caption", **facts):
        done = [record(f"old-{i}", 100) for i in range(num_done)]
        return Progress(RunFacts(stage=stage, root=tmp_path, num_units=num_units, done=done, **facts))

    return start


def record(unit, rows, rejected=0):
    reasons = {"truncated_image": rejected} if rejected else {}
    return Record(unit, "0" * 64, {"prompt": "p", "shard": "s"}, rows, rows - rejected, reasons, [])


def timing(worker="w0", seconds=1.0, busy_s=0.5, attempt=1, peak_rss_bytes=0, worked=None):
    return Timing(worker, seconds, busy_s, attempt, peak_rss_bytes, worked)


def do(shown, unit, rows, rejected=0, **took):
    shown.unit_done(record(unit, rows, rejected), timing(**took))


def until(holds):
    """Wait for the thread that writes."""
    deadline_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


# The line


def test_a_line_counts_what_is_committed_and_in_flight(clock, lines, begin):
    shown = begin(10, num_done=4)
    clock.now_s += 10
    do(shown, "a", 1000, 30, seconds=10, busy_s=8)
    shown.live(500, 7)
    assert shown.line() == "caption 5/10 shards | 1,500 rows | 150.0 rows/s | 37 rejected | eta 6 s | model idle 20%"


def test_workers_that_are_not_at_work_yet_are_counted(lines, begin):
    shown = begin(2)
    shown.workers(0, 3)
    assert shown.line().endswith("| 3 worker(s) starting")
    shown.workers(3, 0)
    assert "starting" not in shown.line()


def test_shards_whose_last_attempt_failed_are_counted_until_one_succeeds(lines, begin):
    shown = begin(2)
    shown.unit_failed("a", 1, "its worker died", final=False)
    assert shown.line().endswith("| 1 shard(s) failing")
    do(shown, "a", 10)
    assert "failing" not in shown.line()


def test_rows_in_flight_are_not_counted_twice_when_their_unit_is_done(clock, lines, begin):
    shown = begin(3)
    clock.now_s += 1
    shown.live(140, 3)  # of two units
    do(shown, "a", 100, 1)
    assert "| 140 rows | 140.0 rows/s | 3 rejected |" in shown.line()


@pytest.mark.parametrize(
    ("num_units", "elapsed_s", "eta"),
    [
        (2, 30, "30 s"),
        (4, 30, "90 s"),
        (41, 30, "20 min"),
        (1001, 30, "8.3 h"),
        (10001, 30, "3.5 days"),
        (1, 30, "0 s"),
    ],
)
def test_the_time_left_follows_the_pace_of_this_run(clock, lines, begin, num_units, elapsed_s, eta):
    shown = begin(num_units)
    clock.now_s += elapsed_s
    do(shown, "a", 10)
    assert f"| eta {eta} |" in shown.line()


def test_the_time_left_is_unknown_before_the_first_row(clock, lines, begin):
    shown = begin(5, num_done=3)
    clock.now_s += 30
    assert shown.line().endswith("eta ?")


def test_units_done_before_do_not_quicken_the_pace(clock, lines, begin):
    shown = begin(100, num_done=98)
    clock.now_s += 60
    do(shown, "a", 100)
    assert "| eta 60 s |" in shown.line()


def test_the_time_left_counts_rows_where_they_are_known(clock, lines, begin):
    shown = begin(2, rows_expected=1000)
    clock.now_s += 10
    do(shown, "small", 100)
    assert "| eta 90 s |" in shown.line()


def test_the_time_left_is_that_of_the_workers_of_now(clock, lines, begin):
    shown = begin(4, rows_expected=400)
    shown.workers(1, 0)
    clock.now_s += 100
    shown.workers(1, 0)
    do(shown, "a", 100)
    assert "| eta 5 min |" in shown.line()
    shown.workers(3, 0)  # two more have come
    assert "| eta 100 s |" in shown.line()
    shown.workers(0, 3)  # all were taken back
    assert "| eta ? |" in shown.line()


def test_the_start_of_workers_does_not_slow_the_pace(clock, lines, begin):
    shown = begin(2)
    for _ in range(10):
        shown.workers(0, 1)
        clock.now_s += 60
    shown.workers(1, 0)
    clock.now_s += 10
    shown.workers(1, 0)
    do(shown, "a", 100)
    assert "| 10.0 rows/s |" in shown.line()
    assert "| eta 10 s |" in shown.line()


def test_shards_set_aside_are_not_waited_for(clock, lines, begin):
    shown = begin(3)
    clock.now_s += 10
    do(shown, "a", 10)
    shown.unit_failed("b", 3, "no memory", final=True)
    assert "| eta 10 s |" in shown.line()


def test_empty_units_do_not_break_the_line(lines, begin):
    shown = begin(3)
    assert "| 0 rows | 0.0 rows/s |" in shown.line()
    do(shown, "a", 0, seconds=0, busy_s=0)
    shown.live(7, 0)
    assert shown.line().startswith("caption 1/3 shards | 7 rows")


def test_a_terminal_gets_one_line_that_is_rewritten(clock, terminal, begin):
    shown = begin(2)
    for _ in range(5):
        clock.now_s += 0.3
        shown.live(10, 0)
    do(shown, "a", 20)
    do(shown, "b", 20)
    shown.close("done")
    assert terminal.text.count("\r\x1b[K") == 6
    assert terminal.text.count("\n") == 1
    assert "caption 2/2 shards | 40 rows" in terminal.text.splitlines()[-1]


def test_a_terminal_is_not_written_to_more_than_five_times_a_second(clock, terminal, begin):
    shown = begin(2)
    for _ in range(100):
        clock.now_s += 0.01
        shown.live(10, 0)
    assert 1 <= terminal.text.count("\r") <= 5


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(clock, lines, begin):
    shown = begin(3)
    for _ in range(25):
        clock.now_s += 1
        shown.live(10, 0)
    assert len(lines()) == 2
    for unit in "abc":
        do(shown, unit, 20)
    shown.close("done")
    assert len(lines()) == 3
    assert lines()[-1].startswith("caption 3/3 shards | 60 rows")
    assert progress.sys.stderr.text == ""


def test_nothing_done_leaves_a_terminal_alone(terminal, begin):
    begin(2, num_done=2).close("done")
    assert terminal.text == ""


def test_a_logged_line_carries_its_figures(clock, lines, begin, caplog):
    shown = begin(4)
    clock.now_s += 20
    do(shown, "a", 200, 5, seconds=20, busy_s=15)
    [line] = [entry for entry in caplog.records if hasattr(entry, "fields")]
    assert line.fields == {
        "stage": "caption", "shards": 4, "shards_done": 1, "shards_failing": 0, "rows": 200, "rejected": 5,
        "rows_per_s": 10.0, "seconds_left": 60.0, "model_busy_share": 0.75, "workers": 0, "workers_starting": 0,
    }  # fmt: skip


def test_a_terminal_whose_log_is_json_gets_no_line_in_place(clock, terminal, begin, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="pipelines.progress")
    monkeypatch.setattr(progress, "is_json", lambda: True)
    shown = begin(2)
    clock.now_s += 11
    shown.live(10, 0)
    assert terminal.text == ""
    assert len(caplog.messages) == 1


# The figures


def test_the_model_is_idle_within_units_and_between_them(clock, lines, begin, tmp_path):
    shown = begin(4)
    clock.now_s += 10
    do(shown, "a", 10, worker="w0", seconds=10, busy_s=9)
    clock.now_s += 10  # 5 of them before the second unit was begun
    do(shown, "b", 10, worker="w0", seconds=5, busy_s=5)
    do(shown, "c", 10, worker="w1", seconds=20, busy_s=10)
    shown.close("stopped")
    assert read_status(tmp_path).total.busy_share == pytest.approx((9 + 5 + 10) / (10 + 10 + 20))


def test_units_that_overlap_in_a_worker_do_not_make_its_model_busier(clock, lines, begin, tmp_path):
    shown = begin(4)
    for unit in "abcd":  # begun five seconds after one another, each taking ten
        clock.now_s += 5
        do(shown, unit, 10, worker="w0", seconds=10, busy_s=6)
    shown.close("done")
    assert read_status(tmp_path).total.busy_share == pytest.approx(0.6)


def test_rows_done_again_are_the_only_ones_that_count_for_the_pace(clock, lines, begin, tmp_path):
    shown = begin(1)
    clock.now_s += 10
    do(shown, "a", 1000, seconds=10, worked=20)
    assert "| 20 rows | 2.0 rows/s |" in shown.line()
    shown.close("done")
    assert read_status(tmp_path).rows_in == 1000


def test_workers_are_paid_for_while_they_are_up(clock, lines, begin, tmp_path):
    shown = begin(4, price_per_hour=3.6)
    for num_working in (0, 2, 2, 4):
        shown.workers(num_working, 0)
        clock.now_s += 100
    do(shown, "a", 10)
    shown.close("stopped")
    status = read_status(tmp_path)
    assert status.total.worker_s == 2 * 100 + 2 * 100 + 4 * 100
    assert status.cost() == pytest.approx(0.8)
    assert status.cost_in_all() == pytest.approx(4 * 0.8)


def test_the_rate_of_now_forgets_what_is_over_a_minute_old(clock, lines, begin, tmp_path):
    shown = begin(2)
    for second in range(200):
        clock.now_s += 1
        shown.live(1000 + min(second, 120), 0)
    until(lambda: (status := read_status(tmp_path)) and status.live_rows == 1120)
    assert read_status(tmp_path).rows_per_s_now == 0.0


def test_rows_that_are_taken_back_are_no_negative_rate(clock, lines, begin, tmp_path):
    shown = begin(2)
    for rows in (500, 0):
        clock.now_s += 10
        shown.live(rows, 0)
        until(lambda rows=rows: (status := read_status(tmp_path)) and status.live_rows == rows)
    assert read_status(tmp_path).rows_per_s_now == 0.0


def test_the_most_memory_is_kept(lines, begin, tmp_path):
    shown = begin(3)
    for unit, size_bytes in (("a", 5_000), ("b", 9_000), ("c", 7_000)):
        do(shown, unit, 1, peak_rss_bytes=size_bytes)
    shown.close("done")
    peaks = read_status(tmp_path).peaks
    assert peaks.worker_bytes == 9_000
    assert peaks.driver_bytes > 10_000_000  # this process, with Ray and Arrow in it


# The status file


def test_the_status_is_there_from_the_start_and_every_five_seconds(clock, lines, begin, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(progress, "write_atomic", lambda path, data: written.append((path.name, json.loads(data))))
    shown = begin(2)
    until(lambda: written)
    for second in range(20):
        clock.now_s += 1
        shown.live(second, 0)
        until(lambda: not shown._writer._pending)
    assert [name for name, _ in written] == [STATUS_FILE] * len(written)
    assert [status["live_rows"] for _, status in written] == [0, 4, 9, 14, 19]


def test_a_driver_with_nothing_new_to_say_still_says_that_it_lives(clock, lines, begin, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_WRITE_EVERY_S", 0.05)
    shown = begin(2)
    until(lambda: read_status(tmp_path))
    clock.now_s += 100  # of making an index
    until(lambda: read_status(tmp_path).updated_unix_s == clock.time())
    shown.close("done")
    clock.now_s += 100
    assert not shown._writer._thread.is_alive()
    assert read_status(tmp_path).updated_unix_s == clock.time() - 100


def test_a_resumed_run_carries_the_totals_on(clock, lines, begin, tmp_path):
    first = begin(3, price_per_hour=1.0)
    first.workers(2, 0)
    clock.now_s += 1800
    first.workers(2, 0)
    do(first, "old-0", 100, 3, seconds=1800, busy_s=900)
    first.unit_failed("b", 1, "its worker died", final=False)
    first.note("worker_died")
    first.close("stopped", "stopped by SIGTERM")
    clock.now_s += 86_400  # a night

    second = begin(3, num_done=1, price_per_hour=1.0)
    assert second._status.failed["b"].reason == "its worker died"
    second.workers(2, 0)
    clock.now_s += 1800
    second.workers(2, 0)
    do(second, "b", 100, seconds=1000, busy_s=900)
    do(second, "c", 100, seconds=10, busy_s=9, worker="w1")
    second.note("worker_died", 2)
    second.close("done")

    status = read_status(tmp_path)
    assert (status.state, status.error, status.num_runs, status.failed) == ("done", "", 2, {})
    assert status.first_started_unix_s == 1_700_001_000.0
    assert status.started_unix_s - status.first_started_unix_s == 1800 + 86_400
    assert (status.num_done, status.rows_in) == (3, 300)
    assert (status.before.rows, status.total.rows) == (100, 300)
    assert status.total.elapsed_s == 3600
    assert status.cost() == pytest.approx(2.0)
    assert [slow.unit for slow in status.slowest] == ["old-0", "b", "c"]
    assert status.events == {"attempt_failed": 1, "worker_died": 3}


def test_a_killed_driver_leaves_a_status_to_go_on_from(clock, lines, begin, tmp_path):
    killed = begin(3)
    killed.workers(1, 0)
    clock.now_s += 60
    killed.workers(1, 0)
    do(killed, "old-0", 100)
    until(lambda: (status := read_status(tmp_path)) and status.num_done == 1)
    assert read_status(tmp_path).state == "running"
    begin(3, num_done=1).close("stopped")
    assert read_status(tmp_path).before.worker_s == 60


def test_a_run_without_anything_to_do_changes_nothing(clock, lines, begin, tmp_path):
    first = begin(1)
    do(first, "old-0", 100)
    first.close("done")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {STATUS_FILE, SUMMARY_FILE} <= before.keys()
    clock.now_s += 1000
    begin(1, num_done=1).close("done")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_without_anything_to_do_still_says_that_all_is_done(clock, lines, begin, tmp_path):
    killed = begin(1)
    clock.now_s += 10
    do(killed, "old-0", 100, seconds=10)
    until(lambda: (status := read_status(tmp_path)) and status.num_done == 1)  # then a kill, before the index was made
    clock.now_s += 1000
    begin(1, num_done=1).close("done")
    status = read_status(tmp_path)
    assert (status.state, status.num_runs, status.num_done) == ("done", 1, 1)
    assert status.total.elapsed_s == 10
    assert "is done" in (tmp_path / SUMMARY_FILE).read_text()


def test_an_output_older_than_the_status_file_gets_one(lines, begin, tmp_path):
    begin(2, num_done=2).close("done")
    status = read_status(tmp_path)
    assert (status.state, status.num_done, status.rows_in, status.total.rows) == ("done", 2, 200, 0)


def test_records_that_count_for_nothing_are_told_apart(lines, begin, tmp_path):
    for unit in ("old-0", "other-1", "to-redo"):
        write_record(tmp_path, record(unit, 100))
    shown = begin(2, num_done=1)
    until(lambda: read_status(tmp_path))
    assert read_status(tmp_path).num_foreign == 2
    do(shown, "to-redo", 100)
    shown.close("done")
    assert read_status(tmp_path).num_foreign == 1


@pytest.mark.parametrize("content", ["{", '{"format": "else"}', '{"stage": 3}'])
def test_a_damaged_status_is_said_and_replaced(lines, begin, tmp_path, content):
    (tmp_path / STATUS_FILE).write_text(content)
    begin(1).close("failed", "x")
    assert any("its totals start anew" in line and STATUS_FILE in line for line in lines())
    assert read_status(tmp_path).error == "x"


def test_the_status_of_another_stage_is_not_carried_on(lines, begin, tmp_path):
    begin(1, stage="filter").close("failed")
    begin(1, stage="caption").close("failed")
    assert read_status(tmp_path).num_runs == 1


def test_a_status_that_cannot_be_written_fails_no_run(clock, lines, begin, tmp_path, monkeypatch):
    def full(path, data):
        raise JobError(f"{path}: cannot write: the disk is full")

    monkeypatch.setattr(progress, "write_atomic", full)
    shown = begin(2)
    for _ in range(30):
        clock.now_s += 1
        shown.live(1, 0)
    shown.close("done")
    said = [line for line in lines() if "the disk is full" in line]
    assert len(said) == 1
    assert "the job goes on without it" in said[0]


def test_a_status_is_written_though_the_sweep_takes_its_temporary_file(lines, begin, tmp_path, monkeypatch):
    rename, swept = os.replace, []

    def swept_first(source, target):
        if not swept:
            swept.append(sweep(tmp_path, [], []))
        rename(source, target)

    monkeypatch.setattr(os, "replace", swept_first)
    begin(2).close("done")
    assert swept == [1]
    assert read_status(tmp_path).state == "done"
    assert lines() == []


def test_storage_that_hangs_holds_up_neither_the_work_nor_the_end(clock, lines, begin, monkeypatch):
    release, reached = threading.Event(), threading.Event()

    def hang(path, data):
        reached.set()
        release.wait(30)

    monkeypatch.setattr(progress, "write_atomic", hang)
    monkeypatch.setattr(progress, "_LAST_WRITE_S", 0.2)
    shown = begin(2)
    assert reached.wait(10)
    started_s = time.monotonic()
    for _ in range(30):
        clock.now_s += 1
        shown.live(1, 0)
    shown.close("stopped")
    assert time.monotonic() - started_s < 5
    release.set()


def test_only_the_first_close_counts(lines, begin, tmp_path):
    shown = begin(2)
    shown.close("failed", "storage")
    shown.close("done")
    assert (read_status(tmp_path).state, read_status(tmp_path).error) == ("failed", "storage")


def test_the_thread_that_writes_ends_with_the_run(lines, begin):
    shown = begin(2)
    thread = shown._writer._thread
    assert thread.is_alive()
    shown.close("done")
    assert not thread.is_alive()


def test_status_and_summary_are_no_leftovers(lines, begin, tmp_path):
    shown = begin(1)
    do(shown, "a", 10)
    shown.close("done")
    assert sweep(tmp_path, [], []) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [STATUS_FILE, SUMMARY_FILE]


def test_the_timeline_of_a_week_is_thinned_out(clock, lines, begin, tmp_path):
    shown = begin(3)
    shown.workers(1, 0)
    for half_hour in range(7 * 24 * 2):
        clock.now_s += 1800
        shown.workers(1, 0)
        shown.live(half_hour * 1000, 0)
    shown.close("stopped")
    timeline = read_status(tmp_path).timeline
    assert 100 < len(timeline) <= 241
    assert timeline[0][0] == 0
    assert timeline[-1][0] == pytest.approx(7 * 86_400, abs=1)
    assert [point[0] for point in timeline] == sorted(point[0] for point in timeline)
