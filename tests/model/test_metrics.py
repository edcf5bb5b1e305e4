import json
import logging
import math
import threading
from dataclasses import dataclass, field, replace

import pytest
import torch

from pixart_data.errors import DataError, JobError
from pixart_model import metrics
from pixart_model.alarms import NONFINITE
from pixart_model.flops import train_flops
from pixart_model.metrics import Meter, Outcome
from pixart_model.parallel import World

MEGA = 10**6
ONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Meeting(World):
    """The processes of a run as threads, which hear of each other without a process group."""

    slots: dict = field(default_factory=dict)
    barrier: threading.Barrier = None

    def gather(self, thing):
        self.slots[self.rank] = thing
        self.barrier.wait(10)
        things = [self.slots[rank] for rank in range(self.size)]
        self.barrier.wait(10)
        return things

    def largest(self, number):
        return max(self.gather(number))


def meet(count, act):
    """Have `count` processes do the same; returns what came of each, an error or a result."""
    slots, barrier, came = {}, threading.Barrier(count), {}

    def be(rank):
        world = Meeting(rank, count, torch.device("cpu"), None, slots, barrier)
        try:
            came[rank] = act(world)
        except Exception as error:  # noqa: BLE001 - it is what came of it
            came[rank] = error

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [came[rank] for rank in range(count)]


class Names:
    """Stands for the rows of an index: the keys of a batch."""

    def __init__(self, *keys):
        self._keys = list(keys)

    def keys(self):
        return self._keys

    def __len__(self):
        return len(self._keys)


def outcome(loss=1.0, grad_norm=0.81, **known):
    given = {"losses": [], "names": [], "tokens": [], "images": 256, "data_s": 0.004, "lr": 2e-5, **known}
    return Outcome(torch.tensor(loss), torch.tensor(grad_norm), **given)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: Clock.now)
    return Clock


@pytest.fixture
def job(make_job, tmp_path):
    return make_job(run={"output": str(tmp_path), "num_steps": 7300})


def lines_of(run_dir):
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_what_its_steps_came_to_without_the_time_of_saving(tmp_path, clock, job, make_job, caplog):
    job = make_job(
        run={"output": str(tmp_path), "num_steps": 7300},
        cost={"peak_tflops": 1e-3, "dollars_per_gpu_hour": 36.0, "watts_per_gpu": 1000, "kg_co2_per_kwh": 0.5},
    )
    meter = Meter(tmp_path, job, ONE, 100)
    tokens = [(4, 16, 20), (4, 8, 30)]
    for loss in (1.0, 2.0):
        meter.add(outcome(loss, tokens=tokens, skipped=1))
        clock.now += 0.4
    with meter.paused():
        clock.now += 60
    with caplog.at_level("INFO"):
        meter.write()
    [line] = lines_of(tmp_path)
    flops = sum(train_flops(job.model, *one) for one in tokens)
    tflops = flops / 0.4 / 1e12
    hours = 60.8 / 3600  # saving costs, too
    memory_bytes, unix_s = line.pop("memory_bytes"), line.pop("time_unix_s")
    assert line == pytest.approx(
        {
            "step": 102, "loss": 1.5, "grad_norm": 0.81, "lr": 2e-5, "step_ms": 400, "data_ms": 4, "data_share": 0.01,
            "images_per_s": 640, "images": 512, "image_tokens": 192, "text_tokens": 100, "skipped": 2,
            "tflops_per_gpu": tflops, "mfu": 1000 * tflops, "num_processes": 1, "device": "cpu",
            "seconds_left": 7198 * 0.4, "gpu_hours": hours, "dollars": 36 * hours, "kwh": hours, "kg_co2": hours / 2,
        }
    )  # fmt: skip
    assert 50 * MEGA < memory_bytes < 100_000 * MEGA
    assert unix_s > 1.7e9
    [record] = caplog.records
    mfu, gigabytes = f"{1000 * tflops:.1%}", f"{memory_bytes / 1e9:.1f} GB"
    assert record.getMessage() == (
        "step 000102/007300 1.4% | loss 1.5000 | grad 0.81 | lr 2.0e-05 | 400 ms | data 1% | 640 img/s | "
        f"mfu {mfu} | {gigabytes} | eta 48.0 min"
    )
    assert record.fields["step"] == 102
    meter.add(outcome(5.0))
    clock.now += 1
    meter.write()
    last = lines_of(tmp_path)[1]
    assert (last["loss"], last["images"], last["step_ms"]) == (5, 256, pytest.approx(1000))


def test_the_log_line_fits_a_terminal_when_all_its_numbers_are_long(tmp_path, clock, make_job, caplog):
    job = make_job(run={"output": str(tmp_path), "num_steps": 300_000}, cost={"peak_tflops": 1e-5})
    meter = Meter(tmp_path, job, ONE, 299_000)
    meter.add(outcome(tokens=[(4, 64, 200)], images=11_392))
    clock.now += 12.345
    with caplog.at_level("INFO"):
        meter.write()
    assert "mfu" in caplog.messages[0]
    assert len("2026-11-21 05:54:52 ") + len(caplog.messages[0]) <= 155


def test_without_a_known_peak_there_is_no_mfu(tmp_path, clock, job, caplog):
    meter = Meter(tmp_path, job, ONE, 0)
    meter.add(outcome(tokens=[(4, 64, 200)]))
    clock.now += 1
    with caplog.at_level("INFO"):
        meter.write()
    [line] = lines_of(tmp_path)
    assert "mfu" not in line
    assert line["tflops_per_gpu"] > 0
    assert "mfu" not in caplog.text


def test_nothing_is_written_where_no_step_was_done(tmp_path, job):
    Meter(tmp_path, job, ONE, 3).write()
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_stops_the_run_one_step_later_at_the_latest(tmp_path, make_job, loss, grad_norm):
    job = make_job(run={"output": str(tmp_path), "dtype": "bf16"})
    (tmp_path / "step_00000010").mkdir()
    meter = Meter(tmp_path, job, ONE, 10)
    names, tokens = [Names("a/1", "a/2")], [(2, 4, 3)]
    meter.add(outcome())
    meter.add(outcome(loss, grad_norm, losses=[torch.tensor([loss, 1.0])], names=names, tokens=tokens, lr=3e-4))
    with pytest.raises(JobError, match="^step 12: expected a finite loss and gradient, found .*a/1") as stop:
        meter.add(outcome(math.nan, math.nan))
    advice = (
        "lower optim.lr or set run.dtype = 'fp32', and run the same command again to go on from the last checkpoint"
    )
    assert str(stop.value).endswith(f"; {advice}")
    assert ("a/2" in str(stop.value)) == math.isfinite(loss)  # a sample whose loss is finite is not to blame for one
    known = json.loads((tmp_path / NONFINITE).read_text())
    assert (known["step"], known["lr"], known["advice"]) == (12, 3e-4, advice)
    assert [str(known["loss"]), str(known["grad_norm"])] == [str(loss), str(grad_norm)]
    assert known["batches"][0]["batch_keys"] == ["a/1", "a/2"]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_cannot_be_done_is_not_advised(tmp_path, job):
    meter = Meter(tmp_path, job, ONE, 0)  # fp32 on a CPU, without a checkpoint
    meter.add(outcome(math.nan, losses=[torch.tensor(math.nan)], names=[Names("k")]))
    with pytest.raises(JobError) as stop:
        meter.check()
    assert str(stop.value).endswith(
        "; lower optim.lr, raise optim.warmup_steps, or look at the samples that are named, and run the same command "
        "again to begin anew, for it has no checkpoint yet"
    )


def test_the_account_of_a_step_that_is_done_again_is_gone_when_the_run_goes_on(tmp_path, job):
    (tmp_path / NONFINITE).write_text('{"step": 3}')
    Meter(tmp_path, job, replace(ONE, rank=1), 2).rewind()
    assert (tmp_path / NONFINITE).exists(), "the first process writes"
    Meter(tmp_path, job, ONE, 2).rewind()
    assert not (tmp_path / NONFINITE).exists()


@pytest.mark.parametrize("asked", ["check", "write"])
def test_the_last_step_is_looked_at_before_a_checkpoint_and_a_line(tmp_path, job, asked):
    meter = Meter(tmp_path, job, ONE, 0)
    meter.add(outcome(math.nan, losses=[torch.tensor(math.nan)], names=[Names("k")]))
    with pytest.raises(JobError, match="^step 1: .* of k "):
        meter.check() if asked == "check" else meter.write()


def test_of_many_keys_sixteen_are_named_and_all_are_written_down(tmp_path, job):
    meter = Meter(tmp_path, job, ONE, 0)
    names = [Names(*(f"k{batch}/{i:02d}" for i in range(20))) for batch in range(2)]
    losses = [torch.ones(20), torch.full((20,), math.inf)]
    meter.add(outcome(math.inf, losses=losses, names=names))
    with pytest.raises(JobError) as stop:
        meter.check()
    assert "k1/15 and 4 more" in str(stop.value)
    assert "k0/" not in str(stop.value)
    assert "k1/16" not in str(stop.value)
    known = json.loads((tmp_path / NONFINITE).read_text())
    assert known["keys"] == [f"k1/{i:02d}" for i in range(20)]
    assert [batch["loss"][0] for batch in known["batches"]] == [1.0, "inf"]


def test_keys_that_cannot_be_read_do_not_hide_the_step(tmp_path, job):
    class Gone(Names):
        def keys(self):
            raise DataError("index.parquet: missing")

    meter = Meter(tmp_path, job, ONE, 0)
    meter.add(outcome(math.nan, losses=[torch.full((2,), math.nan)], names=[Gone("a", "b")]))
    with pytest.raises(JobError, match=r"^step 1: .*the keys of batch 0 cannot be read: index.parquet: missing"):
        meter.check()


def test_the_samples_of_another_process_are_named_by_all(tmp_path, make_job):
    job = make_job(run={"output": str(tmp_path)}, data={"batches_per_step": 4})

    def act(world):
        meter = Meter(tmp_path, job, world, 6)
        loss = math.nan if world.rank == 1 else 1.0
        names = [Names(f"r{world.rank}/{i}") for i in range(2)]
        meter.add(outcome(math.nan, losses=[torch.tensor([1.0]), torch.tensor([loss])], names=names))
        meter.check()

    first, second = meet(2, act)
    assert str(first) == str(second)
    assert "step 7: " in str(first)
    assert "of r1/1 (all in" in str(first)
    known = json.loads((tmp_path / NONFINITE).read_text())
    places = [(one["rank"], one["batch"], one["finite"]) for one in known["batches"]]
    assert places == [(0, 24, True), (0, 26, True), (1, 25, True), (1, 27, False)]


def test_several_processes_write_one_line_of_all_of_them(tmp_path, clock, make_job, caplog):
    job = make_job(run={"output": str(tmp_path)})

    def act(world):
        meter = Meter(tmp_path, job, world, 0)
        meter.rewind()
        waited_s = 0.01 * (world.rank + 1)
        meter.add(outcome(images=10 + world.rank, tokens=[(1, 16, 7)], data_s=waited_s, skipped=world.rank))
        world.gather(None)
        clock.now = 136.0
        meter.write()
        meter.conclude()
        return meter

    with caplog.at_level("INFO"):
        came = meet(2, act)
    assert all(isinstance(one, Meter) for one in came), came
    [line] = lines_of(tmp_path)
    assert (line["images"], line["text_tokens"], line["skipped"], line["num_processes"]) == (21, 14, 1, 2)
    assert line["data_ms"] == pytest.approx(20), "of the one that waited longest"
    assert line["step_ms"] == 36_000
    flops = 2 * train_flops(job.model, 1, 16, 7)
    assert line["tflops_per_gpu"] == pytest.approx(flops / 36 / 2 / 1e12), "of each of the two"
    assert line["gpu_hours"] == pytest.approx(2 * 36 / 3600)
    assert len([text for text in caplog.messages if text.startswith("step ")]) == 1
    assert len([text for text in caplog.messages if "in all" in text]) == 1


def test_lines_after_the_checkpoint_and_a_cut_line_are_dropped_and_what_they_cost_is_not(tmp_path, clock, job):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "gpu_hours": step, "dollars": 2 * step, "skipped": 1} for step in (2, 4, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    meter = Meter(tmp_path, job, ONE, 4)
    meter.rewind()
    assert lines_of(tmp_path) == lines[:2]
    meter.add(outcome())
    clock.now += 3600
    meter.write()
    line = lines_of(tmp_path)[-1]
    assert line["step"] == 5
    assert line["gpu_hours"] == pytest.approx(6 + 1)
    assert line["dollars"] == pytest.approx(12 + 1.57)
    path.write_text("notes\n")
    with pytest.raises(DataError, match=r"metrics.jsonl: not a file of metrics"):
        Meter(tmp_path, job, ONE, 4).rewind()


def test_what_was_spent_is_known_after_two_kills_with_no_line_between(tmp_path, clock, job):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "gpu_hours": step, "dollars": 2 * step}) + "\n" for step in (2, 6))
    )
    for _ in range(2):
        Meter(tmp_path, job, ONE, 4).rewind()
    meter = Meter(tmp_path, job, ONE, 0)  # back to the beginning: its checkpoint was deleted
    meter.rewind()
    assert lines_of(tmp_path) == []
    meter.add(outcome())
    clock.now += 3600
    meter.write()
    [line] = lines_of(tmp_path)
    assert line["gpu_hours"] == pytest.approx(6 + 1)
    assert line["dollars"] == pytest.approx(12 + 1.57)
    (tmp_path / "spent.json").write_text("{")
    Meter(tmp_path, job, ONE, 0).rewind()  # damaged, it stops nothing


def test_a_first_line_that_was_cut_does_not_spoil_the_next_one(tmp_path, job):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "lo')
    for step in (0, 1):
        meter = Meter(tmp_path, job, ONE, step)
        meter.rewind()
        meter.add(outcome())
        meter.write()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_gpu_whose_peak_is_not_known_is_told_of(tmp_path, job, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Odd 1")
    gpu = World(0, 1, torch.device("cuda"))
    with caplog.at_level("INFO"):
        assert metrics._peak_tflops(gpu) is None
        assert metrics._peak_tflops(replace(gpu, rank=1)) is None
    assert caplog.messages == [
        "mfu: the peak of NVIDIA Odd 1 is not known; set cost.peak_tflops to its dense bf16 TFLOP/s to see it"
    ]


def test_the_end_says_what_all_of_the_run_cost_and_did_without(tmp_path, clock, job, caplog):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 4, "gpu_hours": 10.0, "dollars": 15.7, "kwh": 4.0, "skipped": 3}) + "\n")
    meter = Meter(tmp_path, job, ONE, 4)
    meter.rewind()
    meter.add(outcome(skipped=2))
    clock.now += 1800
    meter.write()
    clock.now += 1800
    caplog.clear()
    with caplog.at_level(logging.INFO):
        meter.conclude()
    said, warned = caplog.messages
    assert said == f"{tmp_path}: 5 of 7300 steps done; 11.0 CPU-hours, $17.27, 4.40 kWh, 0.16 kg CO2 in all"
    assert "damaged samples came up 5 times" in warned


def test_a_disk_that_is_full_stops_all_processes(tmp_path, make_job):
    job = make_job(run={"output": str(tmp_path)})
    (tmp_path / "metrics.jsonl").mkdir()

    def act(world):
        meter = Meter(tmp_path, job, world, 0)
        meter.add(outcome())
        meter.write()

    assert [str(error).startswith(f"{tmp_path}/metrics.jsonl: cannot write") for error in meet(2, act)] == [True, True]


def test_trackers_hear_of_every_line_and_picture(tmp_path, job, monkeypatch):
    heard = []

    class Spy:
        def __init__(self, job, run_dir, step):
            heard.append(("open", run_dir, step))

        def figures(self, step, figures):
            heard.append(("figures", step, figures["loss"], "step" in figures))
            assert all(isinstance(value, int | float) for value in figures.values())

        def picture(self, step, path):
            heard.append(("picture", step, path.name))

        def close(self):
            heard.append(("close",))

    monkeypatch.setattr(metrics.trackers, "Trackers", Spy)
    meter = Meter(tmp_path, job, ONE, 7)
    meter.add(outcome(2.5))
    meter.write()
    meter.show(tmp_path / "step_00000008.png")
    meter.conclude()
    assert heard == [
        ("open", tmp_path, 7), ("figures", 8, 2.5, False), ("picture", 8, "step_00000008.png"), ("close",),
    ]  # fmt: skip
    other = replace(ONE, rank=1, size=2)
    heard.clear()
    Meter(tmp_path, job, other, 7).show(tmp_path / "x.png")
    assert heard == []


@pytest.mark.parametrize(("pace", "text"), [(0.123, "0.12"), (9.87, "9.9"), (31.4, "31.4"), (12345.6, "12,346")])
def test_paces_read_well(pace, text):
    assert metrics._pace(pace) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (90, "1.5 min"), (32400, "9.0 h")])
def test_durations_read_well(seconds, text):
    assert metrics._duration(seconds) == text
