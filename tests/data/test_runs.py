"""The status of a run, what is derived from it, and the page that is made of it."""

import json
import shlex
from html.parser import HTMLParser

import pytest

from pixart_data.commits import Record
from pixart_data.errors import DataError
from pixart_data.runs import (
    SILENT_S,
    STATUS_FILE,
    FailedUnit,
    SlowUnit,
    Status,
    Tally,
    advice,
    duration,
    event_lines,
    read_status,
    size,
)
from pixart_data.storage import location, write_atomic
from pixart_data.summaries import summary_page

NOW = 1_800_000_000.0


def status(**known):
    fields = {
        "stage": "caption", "num_units": 10, "first_started_unix_s": NOW - 90_000, "started_unix_s": NOW - 3600,
        "updated_unix_s": NOW - 3, **known,
    }  # fmt: skip
    return Status(**fields)


def failed(unit="b", set_aside=True, reason="no memory"):
    return FailedUnit(unit=unit, attempts=3, reason=reason, set_aside=set_aside)


def record(unit="a", rows=100, rejected=(), **facts):
    rejected = dict(rejected)
    settings = {"captioner": {"model": {"id": "llava"}, "prompt": "Describe <this>"}, "shard": "fingerprint"}
    return Record(unit, "0" * 64, settings, rows, rows - sum(rejected.values()), rejected, [], facts)


class Page(HTMLParser):
    """Checks nesting, and collects what a browser would load and the text of the body."""

    def __init__(self, html):
        super().__init__()
        self.open, self.loads, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in ("meta", "br", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f"{data} "


# The file


def test_a_status_is_read_back_as_it_was_written(tmp_path):
    told = status(
        num_done=3, rejected={"too_large": 2}, failed={"b": failed()}, timeline=[(0, 0, 0), (5.5, 10, 2)],
        slowest=[SlowUnit(unit="a", seconds=5, rows=10, worker="w")], this_run=Tally(rows=10, busy_s=1.5),
    )  # fmt: skip
    write_atomic(tmp_path / STATUS_FILE, told.to_bytes())
    assert read_status(tmp_path) == told


def test_where_no_driver_was_there_is_no_status(tmp_path):
    assert read_status(tmp_path) is None
    assert read_status(tmp_path / "none") is None


def test_a_status_on_an_object_store_is_read_alike(bucket):
    root = location(f"{bucket}/out")
    assert read_status(root) is None
    write_atomic(root / STATUS_FILE, status(num_done=3).to_bytes())
    assert read_status(root).num_done == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected the status of a run, found the file: "),
        ("[]", "expected the status of a run"),
        ('{"stage": "caption"}', "found first_started_unix_s: Field required"),
        (status(version=2).to_bytes().decode(), "expected pixart-run version 1, found pixart-run version 2"),
    ],
)
def test_what_is_no_status_is_said_to_be_none(tmp_path, content, words):
    (tmp_path / STATUS_FILE).write_text(content)
    with pytest.raises(DataError) as caught:
        read_status(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / STATUS_FILE}: ")
    assert words in str(caught.value)


def test_what_a_newer_toolkit_added_is_passed_over(tmp_path):
    tree = json.loads(status(num_done=4).to_bytes())
    (tmp_path / STATUS_FILE).write_text(json.dumps({**tree, "weather": "fine"}))
    assert read_status(tmp_path).num_done == 4


# What is derived


def test_units_are_added_up():
    told = status()
    told.count(record("a", 100, {"too_large": 3}))
    told.count(record("b", 50, {"too_large": 1, "truncated_image": 2}))
    assert (told.num_done, told.rows_in, told.rows_out, told.num_rejected) == (2, 150, 144, 6)
    assert told.rejected == {"too_large": 4, "truncated_image": 2}


def test_a_driver_that_is_silent_for_long_is_taken_for_dead():
    told = status(updated_unix_s=NOW)
    assert told.is_alive(NOW + SILENT_S - 1)
    assert not told.is_alive(NOW + SILENT_S + 1)
    assert told.is_alive(NOW - 30)  # another machine's clock
    assert told.silent_s(NOW - 30) == 0
    assert not status(state="done").is_alive(NOW)


def test_the_ten_slowest_units_are_kept_each_once():
    told = status()
    for number in range(30):
        told.add_slow(SlowUnit(unit=f"u{number}", seconds=number, rows=1, worker="w"))
    told.add_slow(SlowUnit(unit="u29", seconds=25.5, rows=1, worker="w"))  # done again, faster
    assert [slow.unit for slow in told.slowest] == [f"u{n}" for n in (28, 27, 26, 29, 25, 24, 23, 22, 21, 20)]


def test_costs_grow_with_what_is_left():
    told = status(num_done=4, rows_in=400, price_per_hour=3.0, before=Tally(rows=200, worker_s=3600))
    told.this_run = Tally(rows=200, worker_s=3600)
    assert told.cost() == 6.0
    assert told.cost_in_all() == pytest.approx(15.0)
    told.num_done, told.rows_in = 10, 1000
    assert told.cost_in_all() == 6.0


def test_without_a_price_there_is_no_cost():
    assert status().cost() is None
    assert status().cost_in_all() is None


def test_costs_in_all_are_unknown_before_anything_is_done():
    assert status(price_per_hour=2.0).cost_in_all() is None


def test_figures_are_json_and_say_when_they_are_unknown():
    figures = json.loads(json.dumps(status(state="stopped").figures(NOW)))
    assert figures["alive"] is False
    assert figures["seconds_left"] is None
    assert figures["idle_share"] is None


@pytest.mark.parametrize(
    ("known", "alive", "steps"),
    [
        ({}, True, []),
        ({"state": "done", "num_done": 10}, False, []),
        ({}, False, ["the driver is gone", "pixart caption out/job.toml"]),
        ({"state": "stopped"}, False, ["to go on where it was: pixart caption out/job.toml"]),
        ({"state": "failed"}, False, ["mend what the error says"]),
        ({"state": "failed", "failed": {"b": failed()}}, False, ["shards set aside: 1; mend the cause"]),
        ({"state": "done", "num_done": 10, "rejected": {"x": 7}}, False, ["rows rejected: 7", "pixart retry out"]),
        ({"stage": "filter", "state": "done", "num_done": 10, "rejected": {"x": 7}}, False, ["pixart inspect out"]),
        ({"stage": "stats", "state": "done", "num_done": 10, "rejected": {"x": 7}}, False, []),
    ],
)
def test_the_next_step_is_something_to_type(known, alive, steps):
    said = advice(status(**known), "out", alive)
    assert bool(said) == bool(steps)
    assert all(step in " ".join(said) for step in steps)


def test_rows_that_would_be_rejected_again_are_not_offered():
    said = advice(status(state="done", num_done=10, rejected={"no_caption": 7}), "out", False)
    assert "pixart retry" not in " ".join(said)


def test_a_driver_of_this_machine_that_is_gone_is_not_waited_for():
    import subprocess
    import sys

    code = "from pixart_data.processes import process_name; print(process_name())"
    gone = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert status(updated_unix_s=NOW).is_alive(NOW)
    assert not status(updated_unix_s=NOW, process=gone).is_alive(NOW)


def test_rows_of_an_unfinished_run_are_not_to_be_tried_again_yet():
    said = advice(status(state="stopped", num_done=4, rejected={"x": 7}), "out", False)
    assert "pixart inspect out" in said[-1]
    assert "pixart retry" not in " ".join(said)


def test_the_job_file_of_an_object_store_is_not_passed_to_a_command():
    [step] = advice(status(stage="extract 256px", state="stopped"), "s3://b/out", False)
    assert step == (
        "it was stopped; to go on where it was: the same command again; its job file: "
        "aws s3 cp s3://b/out/job.toml . && pixart extract job.toml"
    )
    [step] = advice(status(state="stopped"), "gs://b/out", False)
    assert step.endswith("the same command again; its job file, to be copied here first: gs://b/out/job.toml")
    [step] = advice(status(stage="extract 256px", state="stopped"), "out/256px", False)
    assert step.endswith("pixart extract out/256px/job.toml")


def test_a_place_with_a_space_in_it_can_be_pasted_into_a_shell():
    known = status(state="stopped", num_done=10, rejected={"x": 7})
    for place in ("/data/my run", "s3://b/my run"):
        words = [word for step in advice(known, place, False) for word in shlex.split(step)]
        assert words.count(place) == 2  # of inspect and of retry
        assert f"{place}/job.toml" in words


def test_events_are_told_in_words_and_unknown_ones_as_they_are():
    assert event_lines(status(events={"worker_died": 1200, "moon": 1})) == [
        "1 moon",
        "1,200 workers that died and were replaced",
    ]


def test_times_and_sizes_are_for_people():
    assert [duration(s) for s in (0, 119, 120, 7200, 172_800)] == ["0 s", "119 s", "2 min", "2.0 h", "2.0 days"]
    assert [size(b) for b in (0, 1_500_000, 12_300_000_000)] == ["0.0 MB", "1.5 MB", "12.3 GB"]


# The page


def test_the_page_holds_the_account_and_needs_nothing_else():
    told = status(
        state="failed", error="caption: 1 of 10 shards failed <3> times", num_done=9, price_per_hour=2.0, num_runs=2,
        this_run=Tally(rows=900, units=9, elapsed_s=3600, worker_s=7200, busy_s=6480, span_s=7200),
        failed={"b": failed(reason="<script>alert(1)</script>")}, events={"worker_died": 3},
        slowest=[SlowUnit(unit="a", seconds=600, rows=100, worker="node-1")],
        timeline=[(0, 0, 0), (1800, 300, 2), (3600, 900, 2)],
    )  # fmt: skip
    told.count(record("a", 900, {"too_large": 30, "truncated_image": 6}))
    page = Page(summary_page(told, "out/<x>", record(revision="abc123")))
    assert page.loads == []
    for words in (
        "caption failed", "out/<x>", "1 of 10 shards failed <3> times", "10%", "$4.00",
        "900 rows in = 864 out + 36 rejected", "30 (3.33%)", "shards set aside: 1", "pixart caption 'out/<x>/job.toml'",
        "<script>alert(1)</script>", "3 workers that died", "node-1", "captioner.model.id", "Describe <this>", "abc123",
        "Time at work in 2 runs",
    ):  # fmt: skip
        assert words in page.text, words
    assert "fingerprint" not in page.text  # of one shard, not a setting of the run


def test_the_curve_has_the_rates_of_the_timeline():
    told = status(state="done", timeline=[(0, 0, 1), (10, 100, 1), (10, 100, 1), (20, 500, 1), (40, 500, 1)])
    html = summary_page(told, "out")
    assert "rows per second, up to 40.0" in html
    curve = html.split('points="')[1].split('"')[0].split()
    floor, top = 162.0, 12.0
    heights = [float(point.split(",")[1]) for point in curve]
    assert heights == [floor, *[floor - 150 / 4] * 2, *[top] * 2, *[floor] * 2, floor]


def test_workers_are_drawn_up_to_the_end_of_each_run():
    told = status(
        state="done", timeline=[(0, 0, 0), (10, 100, 4), (20, 200, 0), (20, 200, 0), (30, 300, 2), (40, 400, 0)]
    )
    curve = summary_page(told, "out").split('points="')[2].split('"')[0].split()
    assert [float(point.split(",")[1]) for point in curve] == [162, *[12] * 4, *[87] * 4, 162]


def test_a_page_of_a_run_that_did_nothing_is_whole():
    page = Page(summary_page(status(state="stopped", error=""), "out"))
    assert "caption was stopped" in page.text
    assert "0 rows in = 0 out + 0 rejected" in page.text
    assert "Too short a run" in page.text


def test_of_thousands_of_failed_units_the_page_names_the_first():
    units = {f"u{n:04d}": failed(f"u{n:04d}") for n in range(3000)}
    html = summary_page(status(state="failed", num_units=4000, failed=units), "out")
    assert "u0049" in html
    assert "u0050" not in html
    assert "and 2,950 more" in html
