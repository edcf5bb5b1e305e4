"""The scheduler on a real Ray: fake stages that fail in every way, and the real ones against themselves."""

import errno
import os
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from pipelines.cluster import Share
from pipelines.pool import Pool
from pixart_data.commits import Record
from pixart_data.errors import ConfigError, DataError, JobError, TransientError

pytestmark = pytest.mark.usefixtures("ray_here")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

ONE, TWO = Share(1, 0.1, 0.0), Share(2, 0.1, 0.0)


@dataclass(frozen=True)
class Task:
    """A unit that does what its `what` says, the first `times` times it is tried; attempts are counted in `folder`."""

    id: str
    folder: str = ""
    what: str = ""
    times: int = 99


class OddError(Exception):
    """An error that pickles and does not come back: the constructor wants more than the message."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class FakeStage:
    def __init__(self, driver=0):
        self.driver = driver

    def __call__(self, unit, report):
        tried = Path(unit.folder) / unit.id
        with tried.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(tried.read_text().splitlines()) <= unit.times:
            self.misbehave(unit, report)
        report(3, 1)
        return Record(unit.id, "", {}, 3, 2, {"x": 1}, [])

    def misbehave(self, unit, report):
        if unit.what:
            getattr(self, unit.what.replace("-", "_"))(unit, report)

    def fail(self, unit, report):
        raise ValueError(f"first line\n{unit.id} is broken")

    def odd(self, unit, report):
        raise OddError("one", "two")

    def setting(self, unit, report):
        raise ConfigError("captions.column: no such column")

    def storage(self, unit, report):
        raise JobError("/out: cannot write: the disk is full")

    def passes(self, unit, report):
        raise TransientError("/out: cannot write: stale file handle")

    def unreadable(self, unit, report):
        try:
            raise OSError(errno.ESTALE, "Stale file handle")
        except OSError as error:
            raise DataError("/in/a.tar: cannot be read: Stale file handle") from error

    def damaged(self, unit, report):
        raise DataError("/in/a.parquet: cannot be read; write it again")

    def exit(self, unit, report):
        os._exit(7)

    def slow_exit(self, unit, report):
        time.sleep(1)
        os._exit(7)

    def slow(self, unit, report):
        time.sleep(4)

    def hang(self, unit, report):
        report(1, 0)
        time.sleep(300)

    def copies(self, unit, report):
        from pixart_data import events

        for _ in range(16):
            time.sleep(0.5)
            events.beat()

    def freeze(self, unit, report):
        """Stop the whole process, as a driver that does not come back does."""
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)  # it is another thread that may be told first

    def signal(self, unit, report):
        os.kill(self.driver, signal.SIGTERM)
        time.sleep(60)

    def terminate(self, unit, report):
        os.kill(self.driver, signal.SIGTERM)
        time.sleep(2)

    def wait(self, unit, report):
        report(5, 2)
        while not (Path(unit.folder) / "go").exists():
            time.sleep(0.01)


def no_model():
    raise ConfigError("captioner.model: no such folder: /no; give a folder")


def no_memory():
    os._exit(9)


def broken():
    raise RuntimeError("a bug")


def nothing(rows, rejected):
    pass


class Silent:
    """A watch that remembers what it was told."""

    def __init__(self, live=nothing):
        self.live = live
        self.failures = []
        self.notes = Counter()

    def workers(self, num_working, num_waiting):
        pass

    def unit_failed(self, unit, attempt, reason, final):
        self.failures.append((unit, attempt, reason, final))

    def note(self, kind, count=1):
        self.notes[kind] += count


def make_pool(build, share, max_attempts, watch=None, **options):
    return Pool(build, share, max_attempts, watch or Silent(), **options)


def records_of(pool, units):
    return [done.record for done, _ in pool.work(units)]


def attempts(tmp_path, unit):
    return len((tmp_path / unit).read_text().splitlines())


@pytest.fixture
def tasks(tmp_path):
    return lambda *words: [Task(f"u{i}", str(tmp_path), word) for i, word in enumerate(words)]


def test_every_unit_is_done_once_by_workers_that_load_once(tmp_path, tasks):
    pool = make_pool(FakeStage, TWO, 3)
    records = records_of(pool, tasks(*[""] * 20))
    assert sorted(record.unit for record in records) == sorted(f"u{i}" for i in range(20))
    assert not pool.failed
    assert all(attempts(tmp_path, f"u{i}") == 1 for i in range(20))
    assert len({(tmp_path / f"u{i}").read_text() for i in range(20)}) <= 2


def test_a_unit_that_keeps_failing_is_set_aside_and_the_others_finish(tmp_path, tasks):
    watch = Silent()
    pool = make_pool(FakeStage, TWO, 2, watch)
    records = records_of(pool, tasks("fail", "", "odd", "", "", "damaged"))
    assert sorted((unit, attempt, final) for unit, attempt, _, final in watch.failures) == [
        *(("u0", 1, False), ("u0", 2, True), ("u2", 1, False), ("u2", 2, True), ("u5", 1, False), ("u5", 2, True)),
    ]
    assert sorted(record.unit for record in records) == ["u1", "u3", "u4"]
    assert pool.failed.keys() == {"u0", "u2", "u5"}
    assert pool.failed["u0"].endswith("u0 is broken")
    assert pool.failed["u5"] == "/in/a.parquet: cannot be read; write it again"
    assert "one and two" in pool.failed["u2"]
    assert (attempts(tmp_path, "u0"), attempts(tmp_path, "u2")) == (2, 2)


def test_a_worker_that_dies_is_replaced_and_its_unit_tried_again(tmp_path):
    units = [Task("dies", str(tmp_path), "exit", 1), *(Task(f"u{i}", str(tmp_path)) for i in range(4))]
    pool = make_pool(FakeStage, ONE, 3)
    assert {record.unit for record in records_of(pool, units)} == {unit.id for unit in units}
    pids = (tmp_path / "dies").read_text().splitlines()
    assert len(set(pids)) == 2
    assert not pool.failed


def test_a_unit_that_kills_every_worker_is_set_aside(tmp_path, tasks):
    pool = make_pool(FakeStage, ONE, 2)
    assert [record.unit for record in records_of(pool, tasks("exit", "", ""))] == ["u1", "u2"]
    assert pool.failed["u0"].startswith("its worker died")
    assert attempts(tmp_path, "u0") == 2


@pytest.mark.parametrize(("what", "kind"), [("setting", ConfigError), ("storage", JobError)])
def test_what_no_retry_can_mend_ends_the_job_with_the_same_words(tmp_path, tasks, what, kind):
    with pytest.raises(kind) as caught:
        records_of(make_pool(FakeStage, ONE, 3), tasks(what, "", ""))
    expected = {"setting": "captions.column: no such column", "storage": "/out: cannot write: the disk is full"}
    assert str(caught.value) == expected[what]
    assert attempts(tmp_path, "u0") == 1


def test_a_wrong_setting_found_while_loading_ends_the_job_at_once(tmp_path, tasks):
    with pytest.raises(ConfigError) as caught:
        records_of(make_pool(no_model, TWO, 3), tasks("", ""))
    assert str(caught.value) == "captioner.model: no such folder: /no; give a folder"
    assert not list(tmp_path.iterdir())


def test_a_bug_while_loading_is_not_hidden(tasks):
    with pytest.raises(JobError, match="workers keep failing while they load the model .*a bug"):
        records_of(make_pool(broken, ONE, 3), tasks(""))


def test_workers_that_die_while_they_load_end_the_job(tasks):
    with pytest.raises(JobError, match="workers keep failing while they load .*cluster.num_workers a smaller number"):
        records_of(make_pool(no_memory, ONE, 3), tasks("", ""))


class LostAtFirst:
    """A stage whose first workers die while they load, as those of a node that is taken back do."""

    def __init__(self, folder, times):
        import fcntl

        with (Path(folder) / "starts").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("x")
            file.flush()
            number = (Path(folder) / "starts").stat().st_size
        if number <= times:
            os._exit(9)

    def __call__(self, unit, report):
        return FakeStage()(unit, report)


def test_workers_that_are_lost_together_while_they_load_do_not_end_the_job(tmp_path):
    pool = make_pool(partial(LostAtFirst, str(tmp_path), 4), Share(3, 0.1, 0.0), 3)
    (tmp_path / "units").mkdir()
    units = [Task(f"u{i}", str(tmp_path / "units")) for i in range(4)]
    assert len(records_of(pool, units)) == 4


def test_a_job_in_which_nothing_succeeds_is_not_tried_to_its_end(tmp_path, tasks):
    with pytest.raises(JobError, match="the first 10 attempts all failed, .* is broken; mend the cause"):
        records_of(make_pool(FakeStage, ONE, 3), tasks(*["fail"] * 50))
    assert sum(attempts(tmp_path, path.name) for path in tmp_path.iterdir()) == 10


def test_sigterm_ends_the_job_and_its_handler_is_put_back(tmp_path, tasks, monkeypatch):
    monkeypatch.setattr("pipelines.pool._GRACE_S", 3.0)
    before = signal.getsignal(signal.SIGTERM)
    started_s = time.monotonic()
    with pytest.raises(JobError, match="stopped by SIGTERM; run the same command again to go on where it was"):
        records_of(make_pool(partial(FakeStage, os.getpid()), ONE, 3), tasks("signal", ""))
    assert time.monotonic() - started_s < 30
    assert signal.getsignal(signal.SIGTERM) is before


def test_units_in_flight_may_end_after_sigterm_and_no_others_begin(tmp_path, tasks):
    ended = []
    pool = make_pool(partial(FakeStage, os.getpid()), ONE, 3)
    with pytest.raises(JobError, match="stopped by SIGTERM"):
        deque(map(ended.append, pool.work(tasks("terminate", ""))), maxlen=0)
    assert [done.record.unit for done, _ in ended] == ["u0"]
    assert not (tmp_path / "u1").exists()


@pytest.mark.parametrize("what", ["hang", "freeze"])
def test_a_hung_worker_is_killed_and_its_unit_tried_again(tmp_path, what):
    watch = Silent()
    pool = make_pool(FakeStage, ONE, 3, watch, stall_s=6.0)
    units = [Task("u0", str(tmp_path), what, 1), Task("u1", str(tmp_path))]
    assert sorted(record.unit for record in records_of(pool, units)) == ["u0", "u1"]
    assert watch.notes["worker_hung"] == 1
    assert "no row in 6 s, its worker was killed (cluster.stall_s)" in watch.failures[0][2]
    assert len(set((tmp_path / "u0").read_text().split())) == 2


def test_a_unit_that_always_hangs_is_set_aside(tmp_path, tasks):
    pool = make_pool(FakeStage, ONE, 2, stall_s=2.0)
    assert [record.unit for record in records_of(pool, tasks("hang", ""))] == ["u1"]
    assert "no row in 2 s" in pool.failed["u0"]


def test_storage_that_fails_for_a_while_is_tried_again_after_a_pause(tmp_path):
    calls = []
    watch = Silent(lambda rows, rejected: calls.append(1))
    pool = make_pool(FakeStage, ONE, 3, watch)
    started_s = time.monotonic()
    units = [Task("u0", str(tmp_path), "passes", 1), Task("u1", str(tmp_path))]
    assert [record.unit for record in records_of(pool, units)] == ["u1", "u0"]
    assert time.monotonic() - started_s > 2
    assert len(calls) < 60  # while everything is paused, the driver sleeps
    assert attempts(tmp_path, "u0") == 2


def test_storage_that_is_away_costs_a_unit_no_attempt_until_that_lasts(tmp_path, tasks, monkeypatch):
    monkeypatch.setattr("pipelines.pool._LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr("pipelines.pool._MAX_PAUSES", 4)
    pool = make_pool(FakeStage, ONE, 2)
    assert [record.unit for record in records_of(pool, tasks("", "passes"))] == ["u0"]
    assert "stale file handle" in pool.failed["u1"]
    assert attempts(tmp_path, "u1") == 4 + 2


def test_a_source_that_fails_for_a_while_is_no_fault_of_the_unit(tmp_path):
    pool = make_pool(FakeStage, ONE, 1)
    units = [Task("u0", str(tmp_path), "unreadable", 1)]
    assert [record.unit for record in records_of(pool, units)] == ["u0"]


def test_a_neighbour_of_a_unit_that_kills_its_worker_is_not_set_aside(tmp_path):
    """Two units share a worker; one of them kills it each time. The other one is done, whatever it takes."""
    pool = make_pool(FakeStage, ONE, 2, units_per_worker=2)
    units = [Task("bad", str(tmp_path), "slow-exit"), *(Task(f"u{i}", str(tmp_path), "slow") for i in range(2))]
    assert sorted(record.unit for record in records_of(pool, units)) == ["u0", "u1"]
    assert pool.failed.keys() == {"bad"}
    assert attempts(tmp_path, "bad") == 2


def test_two_units_share_a_worker(tmp_path, tasks):
    began_s = time.monotonic()
    pool = make_pool(FakeStage, ONE, 2, units_per_worker=2)
    assert len(records_of(pool, tasks("slow", "slow", "slow", "slow"))) == 4
    assert time.monotonic() - began_s < 15
    assert len({pid for i in range(4) for pid in (tmp_path / f"u{i}").read_text().split()}) == 1


class Busy:
    """A stage whose units take turns at one model that never waits."""

    def __init__(self):
        from pipelines.engine import Engine

        self.engine = Engine(lambda batch: time.sleep(0.2) or batch)

    def __call__(self, unit, report):
        for _ in range(5):
            self.engine({})
        return Record(unit.id, "", {}, 0, 0, {}, [])


def test_the_model_is_busy_for_all_units_of_its_worker(tasks):
    """Two units share a model that always works: each is told so, and not that it waited half of its time."""
    pool = make_pool(Busy, ONE, 2, units_per_worker=2)
    done = [done for done, _ in pool.work(tasks("", "", "", ""))]
    assert all(0.6 < one.busy_s / one.seconds <= 1.05 for one in done)


def test_a_long_copy_is_no_hang(tmp_path):
    watch = Silent()
    pool = make_pool(FakeStage, ONE, 1, watch, stall_s=4.0)
    assert len(records_of(pool, [Task("u0", str(tmp_path), "copies")])) == 1
    assert not watch.notes


def test_the_pool_grows_with_the_cluster(tmp_path, tasks, monkeypatch):
    monkeypatch.setattr("pipelines.pool._GROW_EVERY_S", 0.5)
    pool = make_pool(FakeStage, ONE, 2, grow=lambda: 2)
    assert len(records_of(pool, tasks(*["slow"] * 4))) == 4
    assert len({pid for i in range(4) for pid in (tmp_path / f"u{i}").read_text().split()}) == 2


def test_rows_in_flight_are_told_while_a_unit_runs(tmp_path, tasks):
    told = []

    def live(rows, rejected):
        told.append((rows, rejected))
        if (5, 2) in told:
            (tmp_path / "go").touch()

    [record] = records_of(make_pool(FakeStage, ONE, 3, Silent(live)), tasks("wait"))
    assert record.unit == "u0"
    assert (5, 2) in told


def test_no_workers_are_left_behind(tasks):
    """What they hold is free again, after a job that went well and after one that did not."""
    records_of(make_pool(FakeStage, TWO, 3), tasks("", ""))
    with pytest.raises(ConfigError) as first:
        records_of(make_pool(no_model, TWO, 3), tasks("", ""))
    with pytest.raises(JobError) as second:
        records_of(make_pool(FakeStage, TWO, 3), tasks("storage", ""))
    deadline_s = time.monotonic() + 20
    while ray.available_resources().get("CPU") != pytest.approx(ray.cluster_resources()["CPU"]):
        assert time.monotonic() < deadline_s, ray.available_resources()
        time.sleep(0.05)
    assert first
    assert second  # errors hold frames, and frames hold what was not ended


def files(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "job.toml"
    }


def same_on_ray(build, root, elsewhere, units):
    """A stage called here, and the same one in workers, on two outputs: equal files and records."""
    direct = {unit.id: build(elsewhere)(unit, nothing) for unit in units}
    on_ray = {record.unit: record for record in records_of(make_pool(partial(build, root), TWO, 1), units)}
    assert on_ray == direct
    assert files(root) == files(elsewhere)
    assert len(files(root)) >= len(units)


def caption_stage(source, model, root):
    from pipelines.caption import CaptionStage
    from pipelines.config import Caption
    from pixart_data.sections import Captioner

    captioner = Captioner(model=model, max_new_tokens=6, batch_size=3, temperature=0.8)
    return CaptionStage(Caption(output=str(root), source=source, captioner=captioner))


def image_stage(source, model, root):
    from pipelines.images import ImageStage
    from pixart_data.sections import ImageFeatures

    return ImageStage(root, source, ImageFeatures(model=model, batch_size=2))


def text_stage(source, model, root):
    from pipelines.texts import TextStage
    from pixart_data.sections import TextFeatures

    return TextStage(root, source, "", TextFeatures(model=model))


@pytest.fixture
def source(pictures, tmp_path):
    """The demo's first pictures and a broken one."""
    from pixart_data.sections import Source

    folder = tmp_path / "source"
    folder.mkdir()
    for path in sorted(pictures.iterdir())[:8]:
        (folder / path.name).symlink_to(path)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return Source(paths=[str(folder)], rows_per_unit=3)


@pytest.mark.parametrize(("build", "model"), [(caption_stage, "llava"), (image_stage, "vae"), (text_stage, "t5")])
def test_a_stage_on_ray_is_the_stage_called_directly(miniatures, source, tmp_path, monkeypatch, build, model):
    import torch

    from pipelines.texts import NullCaption
    from pixart_data.sources import find_units

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives a worker
    units = find_units(source) + ([NullCaption()] if model == "t5" else [])
    same_on_ray(partial(build, source, miniatures[model]), tmp_path / "ray", tmp_path / "here", units)
    torch.set_num_threads(threads)
