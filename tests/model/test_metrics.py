import json

import pytest
import torch

from pixart_data.errors import DataError, JobError
from pixart_model import metrics
from pixart_model.metrics import Meter


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_a_line_holds_the_means_of_its_steps_without_the_time_of_saving(tmp_path, clock, caplog):
    meter = Meter(tmp_path, step=100, num_steps=7300, _since=clock.now)
    for loss in (1.0, 2.0):
        meter.add(torch.tensor(loss), torch.tensor(0.81), images=256, data_s=0.003)
        clock.now += 0.412
    with meter.paused():
        clock.now += 60
    with caplog.at_level("INFO"):
        meter.write(2e-5)
    [line] = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {"step": 102, "loss": 1.5, "grad_norm": 0.81, "lr": 2e-5, "step_ms": 412, "data_ms": 3, "skipped": 0}
    assert line == pytest.approx({**expected, "images_per_s": 256 / 0.412})
    assert caplog.messages == [
        "step 000102/007300 1.4% | loss 1.5000 | grad 0.81 | lr 2.0e-05 | 412 ms | data 3 ms | 621 img/s | eta 49.4 min"
    ]
    meter.add(torch.tensor(5.0), torch.tensor(1.0), images=1, data_s=0)
    clock.now += 1
    meter.write(2e-5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["loss"] == 5


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_the_first_step_that_is_not_finite_is_named(tmp_path, loss, grad_norm):
    meter = Meter(tmp_path, step=10, num_steps=20)
    for values in ((1.0, 1.0), (loss, grad_norm), (float("nan"), float("nan"))):
        meter.add(*(torch.tensor(value) for value in values), images=1, data_s=0)
    with pytest.raises(JobError, match="^step 12: expected a finite loss and gradient"):
        meter.write(1e-3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lines_after_the_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    Meter(tmp_path, step=4, num_steps=9).rewind()
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    path.write_text("notes\n")
    with pytest.raises(DataError, match=r"metrics.jsonl: not a file of metrics"):
        Meter(tmp_path, step=4, num_steps=9).rewind()


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (90, "1.5 min"), (32400, "9.0 h")])
def test_durations_read_well(seconds, text):
    assert metrics._duration(seconds) == text
