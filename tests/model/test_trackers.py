import contextlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pixart_data.errors import ConfigError
from pixart_model import trackers
from pixart_model.trackers import Trackers

image = pytest.importorskip("PIL.Image")


@pytest.fixture
def tensorboard(monkeypatch):
    """What the program is told, in place of the program."""
    told = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            told.append(("open", log_dir, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def add_image(self, name, pixels, step, dataformats):
            told.append((name, pixels.shape, step, dataformats))

        def flush(self):
            pass

        def close(self):
            told.append(("close",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return told


@pytest.fixture
def wandb(monkeypatch):
    """What Weights & Biases is told, in its place."""
    told = []

    def init(**given):
        told.append(("init", given))
        return SimpleNamespace(
            define_metric=lambda *names, **options: told.append(("define", names, options)),
            log=lambda figures: told.append(("log", figures)),
            finish=lambda: told.append(("finish",)),
        )

    module = ModuleType("wandb")
    module.init, module.Image = init, lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def picture(tmp_path):
    path = tmp_path / "step_00000004.png"
    image.new("RGB", (6, 4)).save(path)
    return path


def test_tensorboard_gets_figures_and_grids_and_forgets_the_steps_that_are_repeated(make_job, tmp_path, tensorboard):
    job = make_job(run={"tensorboard": True})
    told = Trackers(job, tmp_path, 3)
    told.figures(4, {"loss": 0.5, "lr": 1e-5})
    told.picture(4, picture(tmp_path))
    told.close()
    assert tensorboard == [
        ("open", str(tmp_path / "tensorboard"), 4), ("loss", 0.5, 4), ("lr", 1e-5, 4), ("grid", (4, 6, 3), 4, "HWC"),
        ("close",),
    ]  # fmt: skip


def test_a_run_that_goes_on_is_the_same_run_at_wandb(make_job, tmp_path, wandb):
    job = make_job(run={"wandb_project": "pixart", "output": str(tmp_path / "run")})
    for step in (0, 2):
        told = Trackers(job, tmp_path / "run", step)
        told.figures(step + 2, {"loss": 0.5})
        told.picture(step + 2, picture(tmp_path))
        told.close()
    inits = [given for what, *rest in wandb if what == "init" for given in rest]
    assert len({given["id"] for given in inits}) == 1
    assert (inits[0]["project"], inits[0]["name"], inits[0]["resume"]) == ("pixart", "run", "allow")
    assert json.dumps(inits[0]["config"])
    assert inits[0]["config"]["optim"]["lr"] == job.optim.lr
    logs = [given for what, *rest in wandb if what == "log" for given in rest]
    assert [entry["step"] for entry in logs] == [2, 2, 4, 4]
    assert ("define", ("*",), {"step_metric": "step"}) in wandb
    assert [what for what, *_ in wandb].count("finish") == 2
    assert Trackers(job, tmp_path / "other", 0) is not None
    assert wandb[-2][1]["id"] != inits[0]["id"]


@pytest.mark.parametrize("moment", ["open", "figures", "picture", "close"])
def test_one_that_fails_is_told_of_once_and_stops_nothing(make_job, tmp_path, tensorboard, wandb, caplog, moment):
    writer = sys.modules["torch.utils.tensorboard"].SummaryWriter
    method = {"open": "__init__", "figures": "add_scalar", "picture": "add_image", "close": "close"}[moment]

    def fail(*args, **given):
        raise RuntimeError("the disk is full\nand more")

    setattr(writer, method, fail)
    told = Trackers(make_job(run={"tensorboard": True, "wandb_project": "p"}), tmp_path, 0)
    for step in (1, 2):
        told.figures(step, {"loss": 0.5})
        told.picture(step, picture(tmp_path))
    told.close()
    assert caplog.messages == [
        "tensorboard: failed (the disk is full); the run goes on without it, its figures are in metrics.jsonl"
    ]
    assert [what for what, *_ in wandb].count("log") == 4, "the other one goes on"


def test_without_being_asked_for_none_is_opened(make_job, tmp_path, tensorboard, wandb):
    told = Trackers(make_job(), tmp_path, 0)
    told.figures(1, {"loss": 0.5})
    told.close()
    assert (tensorboard, wandb) == ([], [])


@pytest.mark.parametrize(
    ("key", "value", "package"), [("tensorboard", True, "tensorboard"), ("wandb_project", "p", "wandb")]
)
def test_a_package_that_is_missing_is_named_before_anything(make_job, monkeypatch, key, value, package):
    real = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    trackers.require(make_job().run)
    with pytest.raises(ConfigError, match=f"^run.{key}: expected the package {package}, .*pip install {package}"):
        trackers.require(make_job(run={key: value}).run)


def test_real_tensorboard_can_be_read_again(make_job, tmp_path):
    """Where it is installed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(run={"tensorboard": True})
    for step, values in ((0, (1.0, 2.0, 3.0)), (1, (20.0,))):  # killed at step 3, goes on from step 1
        with contextlib.closing(Trackers(job, tmp_path, step)) as told:
            for i, value in enumerate(values, start=step + 1):
                told.figures(i, {"loss": value})
            told.picture(step + 1, picture(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert events.Images("grid")
