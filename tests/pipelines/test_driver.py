"""Plans, commits and accounts, with a stage that copies small files; the real stages are in test_pool and tests/e2e."""

import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from ray import cloudpickle

from pipelines.config import Cluster, Stats
from pipelines.driver import Account, Run, execute, make_plan
from pixart_data.commits import Record, publish, read_records, write_record
from pixart_data.errors import ConfigError, DataError, JobError
from pixart_data.leases import output_lock
from pixart_data.storage import staging_path, write_new

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests


@dataclass(frozen=True)
class Task:
    id: str
    rows: int = 10
    bad: int = 0
    fingerprint: str = "f"


class CopyStage:
    """Writes a file for each unit; two files beside the output name units that fail (`broken`), or are overtaken."""

    def __init__(self, root):
        self.root = root

    def __call__(self, unit, report):
        broken, taken = self.root.parent / "broken", self.root.parent / "taken"
        staged = staging_path(self.root / "files", f"{unit.id}.tar")
        staged.write_text(f"{unit.id} {unit.fingerprint}\n" * unit.rows)
        if broken.exists() and unit.id in broken.read_text().split():
            raise RuntimeError(f"{unit.id} is broken")
        if taken.exists() and unit.id == taken.read_text():
            self.take_over()
        file = publish(staged, self.root, self.root / "files", unit.id, ".tar")
        rejected = {"zero_bytes": unit.bad} if unit.bad else {}
        return Record(unit.id, "", {}, unit.rows, unit.rows - unit.bad, rejected, [file], facts={"model": "m"})

    def take_over(self):
        """Do what a run on another machine does that takes this one for dead, and give the driver time to see it."""
        write_new(self.root / ".lease/000002.json", b'{"token": "t", "process": "far-away.17.4711"}')
        time.sleep(2)


def make_run(root, units, settings=None, **changes):
    run = Run(
        stage="copy",
        root=root,
        units=units,
        settings=lambda unit: {**(settings or {"schema": 1}), "shard": unit.fingerprint},
        build=partial(CopyStage, root),
        cluster=Cluster(num_workers=1, cpus_per_worker=0.1, max_attempts=2),
        swept=[root / "files"],
        count=lambda unit: unit.rows,
    )
    return replace(run, **changes)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "out"


def tasks(*names, **fields):
    return [Task(name, **fields) for name in names]


def commit(run, units):
    """Make units done without Ray."""
    from pixart_data.config import digest

    for unit in units:
        record = CopyStage(run.root)(unit, None)
        settings = run.settings(unit)
        write_record(run.root, replace(record, settings=settings, digest=digest(settings)))


def execute_job(run, finish=None):
    job = Stats(output=str(run.root), sets=[{"name": "n", "path": "/p"}])
    return execute(run, job, finish)


def contents(root):
    return {path.name: path.read_bytes() for path in root.glob("files/*")}


def test_a_plan_tells_new_from_done(root):
    run = make_run(root, tasks("a", "b", "c"))
    assert make_plan(run).line(run) == f"copy: 3 shards, 0 done, 3 to do -> {root}"
    commit(run, run.units[:2])
    plan = make_plan(run)
    assert list(plan.done) == ["a", "b"]
    assert [unit.id for unit, _ in plan.todo] == ["c"]
    assert plan.line(run) == f"copy: 3 shards, 2 done, 1 to do -> {root}"
    assert plan.count_line(run) == "copy: 30 rows, 20 done, 10 to do"


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ({"schema": 1, "model": "a"}, {"schema": 1, "model": "b"}, "model changed"),
        ({"text": {"max_tokens": 5, "x": 1}}, {"text": {"max_tokens": 6, "x": 1}}, "text.max_tokens changed"),
        ({"a": 1}, {"a": 1, "b": 2}, "b changed"),
        ({"a": {"b": {"c": 1}}, "d": 1}, {"a": {"b": {"c": 2}}, "d": 2}, "a.b.c, d changed"),
        ({"a": 1}, {"a": {"b": 1}}, "a changed"),
    ],
)
def test_a_plan_says_why_done_units_are_redone(root, before, now, why):
    commit(make_run(root, tasks("a", "b"), before), tasks("a", "b"))
    run = make_run(root, tasks("a", "b", "c"), now)
    assert make_plan(run).line(run) == f"copy: 3 shards, 0 done, 3 to do (1 new; 2 redone: {why}) -> {root}"


def test_a_shard_whose_content_changed_is_redone_alone(root):
    commit(make_run(root, []), tasks("a", "b"))
    run = make_run(root, [Task("a"), Task("b", fingerprint="other")])
    plan = make_plan(run)
    assert list(plan.done) == ["a"]
    assert plan.redo == {"shard changed": ["b"]}


def test_an_account_adds_up_and_sorts_its_reasons():
    records = [
        Record("a", "", {}, 1000, 997, {"zero_bytes": 2, "bad_row": 1}, []),
        Record("b", "", {}, 234, 233, {"bad_row": 1}, []),
    ]
    account = Account.of(records)
    assert account.line() == "1,234 in = 1,230 out + 4 rejected (bad_row 2, zero_bytes 2)"
    assert Account.of([]).line() == "0 in = 0 out + 0 rejected"


@pytest.mark.usefixtures("ray_here")
class TestExecute:
    def test_a_run_is_committed_accounted_for_and_finished(self, root):
        finished = []
        run = make_run(root, [Task("b", bad=1), Task("a"), Task("empty", rows=0)])
        account = execute_job(run, finished.extend)
        assert account.line() == "20 in = 19 out + 1 rejected (zero_bytes 1)"
        assert [record.unit for record in finished] == ["b", "a", "empty"]
        assert {record.unit: record for record in finished} == read_records(root)
        assert finished[0].settings == {"schema": 1, "shard": "f"}
        assert finished[0].facts == {"model": "m"}
        assert (root / "job.toml").is_file()
        assert not list(root.rglob(".tmp-*"))

    def test_a_second_run_does_nothing_and_finishes_again(self, root):
        run = make_run(root, tasks("a", "b"))
        execute_job(run)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("commits/*.json")}
        finished = []
        broken = replace(run, build=None)  # nothing is built where nothing is left
        assert execute_job(broken, finished.extend).rows_in == 20
        assert {path: path.stat().st_mtime_ns for path in root.rglob("commits/*.json")} == before
        assert len(finished) == 2

    def test_failed_units_are_named_and_mended_by_the_same_command(self, root, tmp_path, caplog):
        (tmp_path / "broken").write_text("b d")
        finished = []
        run = make_run(root, tasks("a", "b", "c", "d"))
        with caplog.at_level(logging.ERROR), pytest.raises(JobError) as caught:
            execute_job(run, finished.extend)
        assert "copy: 2 of 4 shards failed 2 times and were set aside, the others are done: b: " in str(caught.value)
        assert "b is broken; d: " in str(caught.value)
        assert list(read_records(root)) == ["a", "c"]
        assert not finished
        (tmp_path / "broken").unlink()
        assert execute_job(run, finished.extend).rows_out == 40
        assert [record.unit for record in finished] == ["a", "b", "c", "d"]
        assert not list(root.rglob(".tmp-*"))

    def test_redone_units_leave_no_old_files(self, root):
        execute_job(make_run(root, tasks("a", "b")))
        old = contents(root)
        execute_job(make_run(root, [Task("a"), Task("b", fingerprint="other")]))
        assert len(contents(root)) == 2
        assert len(contents(root).keys() & old.keys()) == 1
        assert {root / file.path for record in read_records(root).values() for file in record.files} == set(
            root.glob("files/*")
        )

    def test_files_of_a_killed_attempt_are_swept(self, root):
        staging_path(root / "files", "a.tar").write_text("half")
        (root / "files/a-01234567.tar").write_text("published and never committed")
        execute_job(make_run(root, tasks("a")))
        assert len(contents(root)) == 1
        assert not list(root.rglob(".tmp-*"))

    @pytest.mark.parametrize(("rows", "bad", "judged"), [(100, 20, False), (100, 21, True), (99, 99, False)])
    def test_too_many_rejected_rows_are_an_error_after_everything_is_committed(self, root, rows, bad, judged):
        finished = []
        run = make_run(root, [Task("a", rows, bad)])
        if judged:
            with pytest.raises(
                DataError, match=r"21% rejected, limit 20% \(cluster.max_rejected\); everything is comm"
            ):
                execute_job(run, finished.extend)
            lenient = replace(run, cluster=Cluster(max_rejected=0.21))
            assert execute_job(lenient).rows_in == 100
        else:
            execute_job(run, finished.extend)
        assert len(finished) == 1

    @pytest.mark.parametrize(("limit", "judged"), [(0.02, True), (0.03, False)])
    def test_a_single_reason_may_have_a_limit_of_its_own(self, root, limit, judged):
        cluster = Cluster(num_workers=1, cpus_per_worker=0.1, max_rejected_by_reason={"zero_bytes": limit})
        run = make_run(root, [Task("a", 100, 3)], cluster=cluster)
        if not judged:
            assert execute_job(run).rows_out == 97
            return
        with pytest.raises(DataError, match=r"3% zero_bytes, limit 2% \(cluster.max_rejected_by_reason\); every"):
            execute_job(run)
        assert list(read_records(root)) == ["a"]

    def test_a_limit_for_a_reason_that_does_not_exist_is_refused_before_any_work(self, root):
        cluster = Cluster(max_rejected_by_reason={"truncated_imag": 0.1})
        with pytest.raises(ConfigError, match="reason 'truncated_imag': .* did you mean 'truncated_image'"):
            execute_job(make_run(root, tasks("a"), cluster=cluster))
        assert not root.exists()

    def test_a_run_that_is_overtaken_stops_before_its_next_commit(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr("pixart_data.leases.RENEW_S", 0.1)
        (tmp_path / "taken").write_text("b")
        finished = []
        with pytest.raises(JobError, match="this run stops, another run has taken over; run the same command again"):
            execute_job(make_run(root, tasks("a", "b", "c")), finished.extend)
        assert list(read_records(root)) == ["a"]
        assert not finished
        assert json.loads((root / "status.json").read_text())["state"] == "failed"
        assert [path.name for path in root.glob(".lease/*2.json")] == ["000002.json"]  # it is not ours to let go of

    def test_what_is_not_judged_may_reject_everything(self, root):
        assert execute_job(make_run(root, [Task("a", 100, 100)], judged=False)).rows_out == 0

    def test_the_number_of_workers_does_not_show_in_the_output(self, tmp_path):
        units = tasks(*"abcdefgh")
        for workers in (1, 2):
            cluster = Cluster(num_workers=workers, cpus_per_worker=0.1)
            execute_job(make_run(tmp_path / str(workers) / "out", units, cluster=cluster))
        one, two = tmp_path / "1/out", tmp_path / "2/out"
        assert contents(one) == contents(two)
        assert read_records(one) == read_records(two)
        assert [path.read_bytes() for path in sorted(one.glob("commits/*"))] == [
            path.read_bytes() for path in sorted(two.glob("commits/*"))
        ]

    def test_another_run_on_the_output_is_refused_before_anything_is_touched(self, root):
        with output_lock(root), pytest.raises(JobError, match="another run is writing here"):
            execute_job(make_run(root, tasks("a")))
        assert [path.name for path in root.iterdir()] == [".lease"]

    def test_sigterm_in_the_end_of_a_run_stops_it_in_order(self, root):
        import os
        import signal
        import time

        def terminate(records):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

        with pytest.raises(JobError, match="stopped by SIGTERM"):
            execute_job(make_run(root, tasks("a", "b")), terminate)
        assert json.loads((root / "status.json").read_text())["state"] == "stopped"
        assert execute_job(make_run(root, tasks("a", "b"))).rows_out == 20

    def test_an_interrupted_run_keeps_what_it_committed(self, root):
        def interrupt(records):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            execute_job(make_run(root, tasks("a", "b")), interrupt)
        assert list(read_records(root)) == ["a", "b"]
        with output_lock(root):
            pass

    def test_a_record_is_readable_json_that_says_what_decided_it(self, root):
        execute_job(make_run(root, tasks("a"), {"model": "m", "text": {"max_tokens": 5}}))
        fields = json.loads((root / "commits/a.json").read_text())
        assert fields["settings"] == {"model": "m", "text": {"max_tokens": 5}, "shard": "f"}
        assert len(fields["digest"]) == 64
        assert Path(root / fields["files"][0]["path"]).stat().st_size == fields["files"][0]["size_bytes"]


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("workers", [1, 2])
def test_extract_writes_the_same_bytes_with_any_number_of_workers(pictures, miniatures, tmp_path_factory, workers):
    from pipelines import extract
    from pipelines.config import Extract

    output = tmp_path_factory.getbasetemp() / f"extract-{workers}"
    source = {"paths": [str(pictures)], "rows_per_unit": 4}
    cluster = {"num_workers": workers, "cpus_per_worker": 1.0}
    extract.run(Extract(output=str(output), source=source, text={"model": miniatures["t5"]}, cluster=cluster))
    other = output.with_name("extract-1")
    names = {path.relative_to(output) for path in output.rglob("*") if path.suffix in (".tar", ".parquet")}
    assert len(names) == 2 + 2 * 3 + 1
    assert all((output / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert (output / "text/manifest.json").read_text() == (other / "text/manifest.json").read_text()


def test_another_tokenizer_redoes_the_texts(pictures, miniatures, tmp_path):
    """As in diffusers' repositories, where the tokenizer lies in a folder of its own."""
    import shutil

    from pipelines import extract
    from pipelines.config import Extract

    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(miniatures["t5"], tmp_path / "t5" / name)
    text = {"model": str(tmp_path / "t5"), "subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    job = Extract(output=str(tmp_path / "o"), source={"paths": [str(pictures)]}, text=text)

    def settings():
        [(run, _)] = extract.plan(job)
        return run.settings(run.units[0])

    before = settings()
    assert settings() == before
    tokenizer = tmp_path / "t5/tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert settings() != before


@pytest.mark.usefixtures("ray_here")
def test_a_redo_that_stops_half_way_leaves_no_manifest_to_trust(root):
    def seal(records):
        (root / "manifest.json").write_text(str(len(records)))

    execute_job(make_run(root, tasks("a", "b")), seal)
    assert (root / "manifest.json").read_text() == "2"
    (root.parent / "broken").write_text("b")
    changed = make_run(root, tasks("a", "b"), {"schema": 2})
    with pytest.raises(JobError, match="b is broken"):
        execute_job(changed, seal)
    assert not (root / "manifest.json").exists()
    (root.parent / "broken").unlink()
    execute_job(changed, seal)
    assert (root / "manifest.json").read_text() == "2"
