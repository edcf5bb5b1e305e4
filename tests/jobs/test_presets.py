"""The stages of the paper as job files: Table 4's numbers, and each stage on the shoulders of the one before."""

from itertools import pairwise
from pathlib import Path

import pytest

from jobs.cli import JOB_FILES
from pixart_data.config import load
from pixart_model.config import Train

# PixArt-alpha (arXiv:2310.00426), Table 4: px, steps, batch, learning rate; and the samples that it adds up to
STAGES = {
    "pixel_256": (256, 300_000, 128 * 8, 2e-5, 307.2e6),
    "align_256": (256, 150_000, 178 * 64, 2e-5, 1708.8e6),
    "aesthetics_256": (256, 90_000, 178 * 64, 2e-5, 1025.3e6),
    "aesthetics_512": (512, 100_000, 40 * 64, 2e-5, 256.0e6),
    "aesthetics_1024": (1024, 16_000, 12 * 32, 2e-5, 6.1e6),
}
CELL_PX = 8


def preset(name):
    return load(Train, JOB_FILES / f"train_{name}.toml")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_papers_numbers(name):
    px, steps, batch, lr, samples = STAGES[name]
    job = preset(name)
    found = (job.data.image_set, job.model.base_size * CELL_PX, job.run.num_steps, job.optim.lr, job.optim.weight_decay)
    assert found == (f"{px}px", px, steps, lr, 0.05)
    assert job.data.batch_size * job.data.batches_per_step == batch
    assert batch * steps == pytest.approx(samples, rel=0.01)
    assert f"{steps // 1000}K steps of" in (JOB_FILES / f"train_{name}.toml").read_text(), "the arithmetic is shown"


def test_a_stage_starts_from_the_one_before_by_one_key():
    jobs = [preset(name) for name in STAGES]
    assert jobs[0].init.weights is None
    for before, after in pairwise(jobs):
        assert Path(after.init.weights).absolute() == Path(before.run.output)
        assert after.init.model_dump(exclude={"weights"}) == before.init.model_dump(exclude={"weights"})


def test_only_the_last_stage_is_conditioned_on_sizes_and_only_the_first_on_classes():
    assert [preset(name).model.micro_conditioning for name in STAGES] == [False] * 4 + [True]
    assert [preset(name).model.condition for name in STAGES] == ["class"] + ["caption"] * 4
    assert [preset(name).model.interpolation_scale for name in STAGES] == [1, 1, 1, 1, 2]
