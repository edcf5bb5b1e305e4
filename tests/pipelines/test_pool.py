"""The scheduler on a real Ray: fake stages that fail in every way, and the real ones against themselves."""

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from pipelines.cluster import Share
from pipelines.pool import Pool
from pixart_data.commits import Record
from pixart_data.errors import ConfigError, JobError

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
        if unit.what == "raise":
            raise ValueError(f"first line\n{unit.id} is broken")
        if unit.what == "odd":
            raise OddError("one", "two")
        if unit.what == "setting":
            raise ConfigError("captions.column: no such column")
        if unit.what == "storage":
            raise JobError("/out: cannot write: the disk is full")
        if unit.what == "exit":
            os._exit(7)
        if unit.what == "signal":
            os.kill(self.driver, signal.SIGTERM)
            time.sleep(60)
        if unit.what == "wait":
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


def attempts(tmp_path, unit):
    return len((tmp_path / unit).read_text().splitlines())


@pytest.fixture
def tasks(tmp_path):
    return lambda *words: [Task(f"u{i}", str(tmp_path), word) for i, word in enumerate(words)]


def test_every_unit_is_done_once_by_workers_that_load_once(tmp_path, tasks):
    pool = Pool(FakeStage, TWO, 3)
    records = list(pool.work(tasks(*[""] * 20), nothing))
    assert sorted(record.unit for record in records) == sorted(f"u{i}" for i in range(20))
    assert not pool.failed
    assert all(attempts(tmp_path, f"u{i}") == 1 for i in range(20))
    assert len({(tmp_path / f"u{i}").read_text() for i in range(20)}) <= 2


def test_a_unit_that_keeps_failing_is_set_aside_and_the_others_finish(tmp_path, tasks):
    pool = Pool(FakeStage, TWO, 2)
    records = list(pool.work(tasks("raise", "", "odd", "", ""), nothing))
    assert sorted(record.unit for record in records) == ["u1", "u3", "u4"]
    assert pool.failed.keys() == {"u0", "u2"}
    assert pool.failed["u0"].endswith("u0 is broken")
    assert "one and two" in pool.failed["u2"]
    assert (attempts(tmp_path, "u0"), attempts(tmp_path, "u2")) == (2, 2)


def test_a_worker_that_dies_is_replaced_and_its_unit_tried_again(tmp_path):
    units = [Task("dies", str(tmp_path), "exit", 1), *(Task(f"u{i}", str(tmp_path)) for i in range(4))]
    pool = Pool(FakeStage, ONE, 3)
    assert {record.unit for record in pool.work(units, nothing)} == {unit.id for unit in units}
    pids = (tmp_path / "dies").read_text().splitlines()
    assert len(set(pids)) == 2
    assert not pool.failed


def test_a_unit_that_kills_every_worker_is_set_aside(tmp_path, tasks):
    pool = Pool(FakeStage, ONE, 2)
    assert [record.unit for record in pool.work(tasks("exit", "", ""), nothing)] == ["u1", "u2"]
    assert pool.failed["u0"].startswith("its worker died")
    assert attempts(tmp_path, "u0") == 2


@pytest.mark.parametrize(("what", "kind"), [("setting", ConfigError), ("storage", JobError)])
def test_what_no_retry_can_mend_ends_the_job_with_the_same_words(tmp_path, tasks, what, kind):
    with pytest.raises(kind) as caught:
        list(Pool(FakeStage, ONE, 3).work(tasks(what, "", ""), nothing))
    expected = {"setting": "captions.column: no such column", "storage": "/out: cannot write: the disk is full"}
    assert str(caught.value) == expected[what]
    assert attempts(tmp_path, "u0") == 1


def test_a_wrong_setting_found_while_loading_ends_the_job_at_once(tmp_path, tasks):
    with pytest.raises(ConfigError) as caught:
        list(Pool(no_model, TWO, 3).work(tasks("", ""), nothing))
    assert str(caught.value) == "captioner.model: no such folder: /no; give a folder"
    assert not list(tmp_path.iterdir())


def test_a_bug_while_loading_is_not_hidden(tasks):
    with pytest.raises(JobError, match="workers keep failing while they load the model .*a bug"):
        list(Pool(broken, ONE, 3).work(tasks(""), nothing))


def test_workers_that_die_while_they_load_end_the_job(tasks):
    with pytest.raises(JobError, match="workers keep failing while they load .*cluster.num_workers a smaller number"):
        list(Pool(no_memory, ONE, 3).work(tasks("", ""), nothing))


def test_a_job_in_which_nothing_succeeds_is_not_tried_to_its_end(tmp_path, tasks):
    with pytest.raises(JobError, match="the first 10 attempts all failed, .* is broken; mend the cause"):
        list(Pool(FakeStage, ONE, 3).work(tasks(*["raise"] * 50), nothing))
    assert sum(attempts(tmp_path, path.name) for path in tmp_path.iterdir()) == 10


def test_sigterm_ends_the_job_and_its_handler_is_put_back(tmp_path, tasks):
    before = signal.getsignal(signal.SIGTERM)
    started_s = time.monotonic()
    with pytest.raises(JobError, match="stopped by SIGTERM; run the same command again to go on where it was"):
        list(Pool(partial(FakeStage, os.getpid()), ONE, 3).work(tasks("signal", ""), nothing))
    assert time.monotonic() - started_s < 30
    assert signal.getsignal(signal.SIGTERM) is before


def test_rows_in_flight_are_told_while_a_unit_runs(tmp_path, tasks):
    told = []

    def live(rows, rejected):
        told.append((rows, rejected))
        if (5, 2) in told:
            (tmp_path / "go").touch()

    [record] = Pool(FakeStage, ONE, 3).work(tasks("wait"), live)
    assert record.unit == "u0"
    assert (5, 2) in told


def test_no_workers_are_left_behind(tasks):
    """What they hold is free again, after a job that went well and after one that did not."""
    list(Pool(FakeStage, TWO, 3).work(tasks("", ""), nothing))
    with pytest.raises(ConfigError) as first:
        list(Pool(no_model, TWO, 3).work(tasks("", ""), nothing))
    with pytest.raises(JobError) as second:
        list(Pool(FakeStage, TWO, 3).work(tasks("storage", ""), nothing))
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
        if path.is_file() and path.name not in (".lock", "job.toml")
    }


def same_on_ray(build, root, elsewhere, units):
    """A stage called here, and the same one in workers, on two outputs: equal files and records but for seconds."""
    direct = {unit.id: build(elsewhere)(unit, nothing) for unit in units}
    on_ray = {record.unit: record for record in Pool(partial(build, root), TWO, 1).work(units, nothing)}
    assert {unit: replace(record, seconds=0) for unit, record in on_ray.items()} == {
        unit: replace(record, seconds=0) for unit, record in direct.items()
    }
    assert files(root) == files(elsewhere)
    assert len(files(root)) >= len(units)


def caption_stage(source, model, root):
    from pipelines.caption import CaptionStage
    from pipelines.config import Caption
    from pixart_data.sections import Captioner

    captioner = Captioner(model=model, max_new_tokens=6, batch_size=3, temperature=0.8)
    return CaptionStage(Caption(output=str(root), source=source, captioner=captioner))


def image_stage(source, model, root):
    from pipelines.features import ImageStage
    from pixart_data.sections import ImageFeatures

    return ImageStage(root, source, ImageFeatures(model=model, batch_size=2))


def text_stage(source, model, root):
    from pipelines.features import TextStage
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

    from pipelines.features import NullCaption
    from pixart_data.sources import find_units

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives a worker
    units = find_units(source) + ([NullCaption()] if model == "t5" else [])
    same_on_ray(partial(build, source, miniatures[model]), tmp_path / "ray", tmp_path / "here", units)
    torch.set_num_threads(threads)
