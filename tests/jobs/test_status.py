"""`pixart status`: what a person sees of a run that goes on, was killed, or is done, here and on an object store."""

import json
import time

import pytest

from jobs import cli
from pixart_data.commits import COMMITS, Record, write_record
from pixart_data.runs import STATUS_FILE, SUMMARY_FILE, FailedUnit, Peaks, SlowUnit, Status, Tally
from pixart_data.storage import location, write_atomic


def status(capsys, *words):
    code = cli.main(["status", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def record(unit, rows=100, rejected=()):
    rejected = dict(rejected)
    return Record(unit, "0" * 64, {}, rows, rows - sum(rejected.values()), rejected, [])


def write_run(root, units=("a", "b"), silent_s=3.0, rejected=(), **known):
    """Leave what a driver leaves: records, and the status it wrote `silent_s` ago."""
    now_unix_s = time.time()
    fields = {
        "stage": "caption", "num_units": 4, "first_started_unix_s": now_unix_s - 90_000, "driver": "head-1 (pid 7)",
        "started_unix_s": now_unix_s - 600, "updated_unix_s": now_unix_s - silent_s, **known,
    }  # fmt: skip
    told = Status(**fields)
    for unit in units:
        write_record(root, record(unit, rejected=rejected))
        told.count(record(unit, rejected=rejected))
    write_atomic(root / STATUS_FILE, told.to_bytes())
    return told


def test_a_run_that_goes_on(capsys, tmp_path):
    write_run(
        tmp_path, rejected={"too_large": 3}, num_working=2, num_waiting=1, live_rows=40, rows_per_s_now=1.25,
        price_per_hour=3.0, this_run=Tally(rows=160, units=2, elapsed_s=400, worker_s=800, busy_s=600, span_s=800),
        before=Tally(rows=40, units=1, elapsed_s=100, worker_s=400), num_runs=2, events={"worker_died": 2},
        failed={"c": FailedUnit(unit="c", attempts=1, reason="its worker died", set_aside=False)},
        slowest=[SlowUnit(unit="b", seconds=300, rows=100, worker="w1")],
        peaks=Peaks(worker_bytes=2_500_000_000, driver_bytes=300_000_000, object_store_bytes=1_000_000),
    )  # fmt: skip
    code, out, err = status(capsys, tmp_path)
    assert (code, err) == (0, "")
    for words in (
        f"caption -> {tmp_path}", "running, last sign of life 3 s ago, from head-1 (pid 7)", "2, the first started at",
        "2 of 4 done, 2 left", "200 in = 194 out + 6 rejected; 40 more in flight", "rejected  too_large 6",
        "1.2 rows/s now, 0.5 in this run, 0.5 rows/s over 8 min of work", "2 up, 1 starting or waiting for room",
        "time left 5 min, until about ",  # 160 rows, of two workers that took four seconds for each
        "busy 75% of the workers' time, idle 25%", "at most 2.5 GB in a worker, 300.0 MB in the driver, 1.0 MB",
        "$1.00 so far, about $1.67 in all (0.33 worker-hours at $3.00)", "slowest   b: 5 min for 100 rows, on w1",
        "failed    c: to be tried again after 1 attempt(s): its worker died", "events    2 workers that died",
    ):  # fmt: skip
        assert words in out, words
    assert "next" not in out


def test_a_run_whose_driver_was_killed_says_since_when_and_what_to_type(capsys, tmp_path):
    write_run(tmp_path, silent_s=4000)
    _, out, _ = status(capsys, tmp_path)
    assert "dead: last sign of life 67 min ago, from head-1 (pid 7), at 20" in out
    assert "next      the driver is gone, or cannot write here; what is committed stays: pixart caption " in out
    assert "time left" not in out


def test_records_that_the_last_status_did_not_see_are_counted(capsys, tmp_path):
    write_run(tmp_path, silent_s=100, failed={"c": FailedUnit(unit="c", attempts=1, reason="x", set_aside=False)})
    write_record(tmp_path, record("c", 50))
    _, out, _ = status(capsys, tmp_path)
    assert "3 of 4 done, 1 left" in out
    assert "250 in = 250 out + 0 rejected" in out
    assert "failed" not in out


def test_records_to_be_redone_are_not_counted(capsys, tmp_path):
    write_run(tmp_path, units=["a"], num_foreign=2)
    for unit in ("b", "elsewhere"):
        write_record(tmp_path, record(unit))
    _, out, _ = status(capsys, tmp_path)
    assert "1 of 4 done, 3 left" in out
    assert "not counted: 2 records of other sources, or to be redone" in out


def test_a_failed_run_names_its_error_its_units_and_the_next_step(capsys, tmp_path):
    units = {
        f"u{n:02d}": FailedUnit(unit=f"u{n:02d}", attempts=3, reason=f"no memory {n}", set_aside=True)
        for n in range(25)
    }
    write_run(tmp_path, state="failed", error="25 shards were set aside", num_units=27, failed=units)
    (tmp_path / SUMMARY_FILE).write_text("page")
    _, out, _ = status(capsys, tmp_path)
    assert "failed 3 s ago" in out
    assert "error     25 shards were set aside" in out
    assert "2 of 27 done, 0 left, 25 set aside" in out
    assert "failed    u00: set aside after 3 attempt(s): no memory 0" in out
    assert "no memory 19" in out
    assert "no memory 20" not in out
    assert "and 5 more" in out
    assert f"page      {tmp_path / SUMMARY_FILE}" in out
    assert f"next      shards set aside: 25; mend the cause, then: pixart caption {tmp_path}/job.toml" in out


def test_a_run_that_is_done_needs_no_next_step(capsys, tmp_path):
    write_run(tmp_path, units="abcd", state="done")
    _, out, _ = status(capsys, tmp_path)
    assert "done 3 s ago" in out
    assert "4 of 4 done, 0 left" in out
    assert "next" not in out


def test_a_run_that_makes_its_index_says_so(capsys, tmp_path):
    write_run(tmp_path, units="abcd")
    assert "finishing: every shard is done, last sign of life" in status(capsys, tmp_path)[1]


def test_an_output_of_an_older_toolkit_is_counted(capsys, tmp_path):
    write_record(tmp_path, record("a", rejected={"too_large": 1}))
    code, out, _ = status(capsys, tmp_path)
    assert code == 0
    assert f"no {STATUS_FILE} here: only what is committed is known" in out
    assert "100 in = 99 out + 1 rejected" in out


def test_a_damaged_status_does_not_hide_what_is_committed(capsys, tmp_path, caplog):
    write_record(tmp_path, record("a"))
    (tmp_path / STATUS_FILE).write_text("{")
    code, out, _ = status(capsys, tmp_path)
    assert code == 0
    assert "1 done" in out
    assert any("expected the status of a run" in line and "delete it" in line for line in caplog.messages)


def test_json_is_one_object_with_the_derived_figures(capsys, tmp_path):
    write_run(tmp_path, rejected={"too_large": 3}, num_working=1, price_per_hour=1.0)
    code, out, _ = status(capsys, tmp_path, "--json")
    [run] = json.loads(out)["runs"]
    assert code == 0
    assert run["output"] == str(tmp_path)
    assert (run["alive"], run["num_done"], run["units_left"], run["rows_rejected"]) == (True, 2, 2, 6)
    assert run["cost_dollars"] == 0.0
    assert run["rejected"] == {"too_large": 6}


def test_the_runs_of_a_dataset_are_shown_one_after_another(capsys, tmp_path):
    write_run(tmp_path / "256px", stage="extract 256px", state="done", units="abcd")
    write_run(tmp_path / "text", stage="extract text", units=[])
    (tmp_path / "other").mkdir()
    _, out, _ = status(capsys, tmp_path)
    titles = [line for line in out.splitlines() if not line.startswith(" ")]
    assert titles == [f"extract 256px -> {tmp_path}/256px", f"extract text -> {tmp_path}/text"]
    _, out, _ = status(capsys, tmp_path, "--json")
    assert [run["stage"] for run in json.loads(out)["runs"]] == ["extract 256px", "extract text"]


def test_a_job_file_stands_for_its_output(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "out")
    (tmp_path / "caption.toml").write_text('output = "out"\n[source]\npaths = ["x"]\n')
    code, out, _ = status(capsys, tmp_path / "caption.toml")
    assert code == 0
    assert out.startswith(f"caption -> {tmp_path}/out\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [("steps = 3\n", "output: required, and missing"), ("=", "cannot be read as a job file"), (None, "cannot be read")],
)
def test_a_job_file_without_an_output_is_a_setting_that_is_wrong(capsys, tmp_path, content, words):
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_text(content)
    code, out, err = status(capsys, path)
    assert (code, out) == (2, "")
    assert words in err
    assert str(path) in err


@pytest.mark.parametrize("name", ["", "none"])
def test_where_there_is_no_run_the_command_says_what_to_give_it(capsys, tmp_path, name):
    code, out, err = status(capsys, tmp_path / name)
    assert (code, out) == (2, "")
    assert f"found neither {STATUS_FILE} nor {COMMITS}/ at {tmp_path / name}" in err
    assert "give the directory that the job file names as output" in err


def test_a_damaged_record_is_the_data_to_blame(capsys, tmp_path):
    write_run(tmp_path)
    (tmp_path / COMMITS / "b.json").write_text("{")
    code, _, err = status(capsys, tmp_path)
    assert code == 3
    assert "b.json" in err


def test_nothing_is_written_by_looking(capsys, tmp_path):
    write_run(tmp_path, silent_s=4000)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status(capsys, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_dry_run_says_what_would_be_read(capsys, tmp_path):
    write_run(tmp_path)
    code, out, _ = status(capsys, tmp_path, "--dry-run")
    assert (code, out) == (0, f"status: would read {tmp_path}\n")


def test_a_run_on_an_object_store_is_seen_by_its_url(capsys, bucket):
    root = location(f"{bucket}/set")
    write_run(root / "captions", rejected={"too_large": 1}, silent_s=900)
    for url in (f"{bucket}/set/captions", f"{bucket}/set"):
        code, out, _ = status(capsys, url)
        assert code == 0
        assert f"caption -> {bucket}/set/captions" in out
        assert "200 in = 198 out + 2 rejected" in out
        assert "what is committed stays: the same command again" in out
    code, _, err = status(capsys, f"{bucket}/none")
    assert code == 2
    assert f"at {bucket}/none" in err


def test_text_of_others_does_not_reach_the_terminal_raw(capsys, tmp_path):
    write_run(tmp_path, state="failed", error="a\x1b[31mb\rc")
    assert "a\ufffd[31mb\ufffdc" in status(capsys, tmp_path)[1]


# Logs


def test_log_json_makes_every_line_of_stderr_an_object(pixart, tmp_path):
    done = pixart("status", tmp_path / "none", "--log-json")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = map(json.loads, done.stderr.splitlines())
    assert (line["level"], line["command"], line["exit_code"]) == ("error", "status", 2)
    assert "found neither" in line["message"]


def test_log_json_of_a_pipeline(pixart, pictures, miniatures, job_file, tmp_path):
    job = job_file(
        "caption",
        {
            "output": str(tmp_path / "out"),
            "source": {"paths": [str(pictures)]},
            "captioner": {"model": miniatures["llava"], "max_new_tokens": 2, "dtype": "fp32"},
            "cluster": {"num_workers": 1, "price_per_hour": 2.0},
        },
    )
    done = pixart("caption", job, "--log-json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "command", "message"} <= line.keys() for line in lines)
    last = next(line for line in reversed(lines) if "rows_per_s" in line)
    assert (last["stage"], last["shards"], last["shards_done"], last["rows"]) == ("caption", 1, 1, 12)
    assert last["seconds_left"] == 0
    assert "12 in = 12 out + 0 rejected" in done.stdout

    seen = pixart("status", job, "--json")
    [run] = json.loads(seen.stdout)["runs"]
    assert (run["state"], run["num_done"], run["rows_in"], run["rows_out"]) == ("done", 1, 12, 12)
    assert 0 < run["busy_share"] <= 1
    assert run["cost_dollars"] > 0
    assert run["peaks"]["worker_bytes"] > 50e6
    assert "caption is done" in (tmp_path / "out" / SUMMARY_FILE).read_text()
    assert pixart("verify", tmp_path / "out").returncode == 0
    before = (tmp_path / "out" / STATUS_FILE).read_bytes()
    assert pixart("caption", job).returncode == 0
    assert (tmp_path / "out" / STATUS_FILE).read_bytes() == before
