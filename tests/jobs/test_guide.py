"""The guide of clusters shows what the code renders, and its arithmetic is arithmetic."""

import pytest

from jobs import budget, guide
from jobs.budget import Budget, Rates, Stage


def test_the_guide_shows_what_is_rendered():
    text = guide.GUIDE.read_text()
    made = guide.commands(text)
    assert [target for target in ("slurm", "k8s", "ray") if any(f"--on {target} " in line for line in made)] == [
        "slurm",
        "k8s",
        "ray",
    ]
    assert all("--nodes 8" in line for line in made if line.startswith("pixart"))
    assert text == guide.renewed(text), "run: python -m jobs.guide"


def test_a_stale_part_is_noticed():
    text = "a\n<!-- made by: python -m jobs.budget -->\nold\n<!-- end -->\nb\n"
    assert guide.renewed(text) == text.replace("old\n", Budget().table())


def test_an_unknown_or_failing_command_is_an_error(capsys):
    with pytest.raises(ValueError, match="rm -rf: expected pixart submit"):
        guide.renewed("<!-- made by: rm -rf -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="exited with 2"):
        guide.renewed("<!-- made by: pixart submit verify /x --on k8s --print -->\n<!-- end -->\n")


def test_hours_follow_from_rates():
    eight = Budget(num_images=3600 * 64, num_nodes=8, gpus_per_node=8, storage_gb_per_s=1.0)
    stage = Stage("one", rate=1.0, read_bytes=10e6, write_bytes=0.0)
    assert eight.hours(stage) == (pytest.approx(1.0), pytest.approx(0.64))
    assert Budget(num_images=3600 * 64, num_nodes=4).hours(stage)[0] == pytest.approx(2.0)


def test_bytes_follow_from_the_format():
    overhead = budget._SAMPLE_OVERHEAD_BYTES
    assert budget.moments_bytes(256) - overhead == 2 * 4 * 32 * 32 * 2
    assert budget.moments_bytes(512) - overhead == 65_536
    assert budget.text_bytes(120) - overhead == 983_040  # the largest sample of a text set


def test_the_overhead_of_a_sample_is_what_the_writer_adds(tmp_path):
    """A tar member of one safetensors tensor: header of the tar, header of the tensor, padding."""
    import tarfile

    import torch
    from safetensors.torch import save

    raw = save({"moments": torch.zeros(2, 4, 32, 32, dtype=torch.float16)})
    assert tarfile.BLOCKSIZE <= len(raw) - 16_384 + 2 * tarfile.BLOCKSIZE <= budget._SAMPLE_OVERHEAD_BYTES


def test_what_is_slower_decides():
    fast = Budget(rates=Rates(vae_256=1e9), storage_gb_per_s=1.0).table()
    [row] = [line for line in fast.splitlines() if "extract 256 px" in line]
    hours = (11e6 * (1e6 + budget.moments_bytes(256))) / 1e9 / 3600
    assert f"| {hours:.1f} | storage | ${hours * 8 * 21.96:,.0f} |" in row
    [row] = [line for line in Budget().table().splitlines() if "in-process" in line]
    assert f"| {11e6 / 128 / 3600:.1f} | GPUs |" in row


def test_the_guide_s_words_say_what_the_table_says():
    text = " ".join(guide.GUIDE.read_text().split())
    here = Budget()
    stages = {stage.name: stage for stage in here.stages()}
    kept = [stage for name, stage in stages.items() if name != "caption, served"]
    hours = sum(max(here.hours(stage)) for stage in kept)
    dollars = hours * here.num_nodes * here.node_usd_per_h
    tb = sum(stage.write_bytes for stage in kept) * here.num_images / budget.TB
    assert f"is {hours:.0f} hours and about ${round(dollars, -2):,.0f} on demand, and {tb:.0f} TB kept" in text
    small = stages["extract 256 px"]
    gpu_h, storage_h = here.hours(small)
    assert f"takes {here.num_images * here.rates.image_bytes / here.storage_gb_per_s / 1e9 / 60:.0f} minutes" in text
    assert f"More than {64 * gpu_h / storage_h:.0f} GPUs do nothing for `extract` at 256 px" in text
    first = stages["caption, in-process"]
    assert f"Captioning needs {first.read_bytes * first.rate * 64 / 1e9:.2f} GB/s" in text
    assert f"a node decodes {small.rate * 8:,.0f} images a second, about {small.rate * 8 / 96:.0f} a second on" in text
    epoch_tb = (small.write_bytes + stages["extract text"].write_bytes) * here.num_images / budget.TB
    assert f"Training at 256 px then reads {epoch_tb:.0f} TB an epoch" in text
