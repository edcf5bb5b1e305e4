"""diff, merge, split and compact as they are typed."""

import os

import pytest

from jobs.cli import main
from tests.sealing import write_images, write_texts


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a dataset `data` of 40 samples."""
    monkeypatch.chdir(tmp_path)
    keys = [f"s/{i}" for i in range(40)]
    write_images(tmp_path / "data/256px", {"u": [(key, "1.00") for key in keys]}, rejected=["bad"])
    write_texts(tmp_path / "data/text", {"u": [(key, f"caption {i % 5}") for i, key in enumerate(keys)]})
    return tmp_path


def test_a_dataset_is_split_merged_and_compared(here, capsys):
    split = ["split", "data", "--out", "parts", "--share", "train=0.5", "--share", "val=0.5"]
    assert main([*split, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "split: train: 256px: would have " in told
    assert not (here / "parts").exists()
    assert main(split) == 0
    assert main(["merge", "parts/train", "parts/val", "--out", "joint", "--dry-run"]) == 0
    assert not (here / "joint").exists()
    assert main(["merge", "parts/train", "parts/val", "--out", "joint"]) == 0
    told = capsys.readouterr().out
    assert f"merge: 256px: 40 samples in 1 shards -> {here}/joint/256px" in told
    assert (here / "joint/256px/job.toml").read_text().startswith("# pixart merge\n")
    assert main(["merge", "joint/256px/job.toml"]) == 0
    assert main(["diff", "data", "joint"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "256px: 40 samples in both, 40 of them the same",
        "text: 40 samples in both, 40 of them the same",
        "diff: 2 sets, 80 samples, no difference",
    ]


def test_a_difference_is_exit_code_3_and_said_on_both_streams(here, capsys):
    assert main(["split", "data", "--out", "parts", "--where", "few=original_width_px > 35 and key < 's/2'"]) == 0
    assert "split: 256px: 30 samples are in no part" in capsys.readouterr().out
    assert main(["diff", "data", "parts/few", "--dry-run"]) == 0
    assert "diff: would read 256px with 40 samples in" in capsys.readouterr().out
    assert main(["diff", "data", "parts/few"]) == 3
    told = capsys.readouterr()
    assert f"  30 sample(s) only in {here}/data/256px: s/0, s/1, s/2, ...\n" in told.out
    assert "expected the same samples, found differences: 256px: 30 sample(s) only in" in told.err
    assert "(and 2 more line(s) like it)" in told.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["split", "data", "--out", "p"], "expected either --share NAME=SHARE or --where NAME=QUERY, found neither"),
        (["split", "data", "--out", "p", "--share", "a=1", "--where", "b=x"], "NAME=QUERY, found both; give one"),
        (
            ["split", "data", "--out", "p", "--share", "a"],
            "--share a: expected NAME=SHARE, found no value; write e.g. --share",
        ),
        (["split", "data", "--out", "p", "--share", "=1"], "--share =1: expected NAME=SHARE, found no name"),
        (["split", "data", "--out", "p", "--share", "a=x"], "share: expected NAME=SHARE, e.g. val=0.01, found a=x"),
        (["split", "data", "--out", "p", "--where", "a"], "--where a: expected NAME=QUERY, found no value; write e.g."),
        (
            ["split", "data", "--out", "p", "--share", "a=0.5", "--share", "b=0.1", "--share", "a=0.1"],
            "--share a=0.1: expected each name once, found a=0.5 before; rename or omit one",
        ),
        (
            ["split", "data", "--out", "p", "--where", "a=row < 3", "--where", "a=row > 3"],
            "--where a=row > 3: expected each name once, found a=row < 3 before",
        ),
        (["split", "data", "--out", "p", "--share", "a=2"], "share: expected shares above 0 and up to 1, found a=2"),
        (
            ["split", "data", "--out", "p", "--share", "a=nan"],
            "share: expected shares above 0 and up to 1, found a=nan",
        ),
        (["split", "data", "--out", "p", "--share", "a=.6", "--share", "b=.6"], "add up to at most 1, found 1.2"),
        (["split", "data", "--out", "p", "--share", "../a=1"], "names of folders, e.g. train, found '../a'"),
        (
            ["split", "data", "--out", "data", "--share", "a=1"],
            "output: expected a folder of its own, found the dataset",
        ),
        (["split", "data", "--out", "p", "--share", "a=1", "--set", "queried_set=text"], "expected it beside --where"),
        (["merge", "data", "--out", "data"], "output: expected a folder of its own, found the dataset"),
        (["compact", "data", "--out", "data"], "output: expected another folder than the dataset's own"),
    ],
)
def test_mistakes_are_exit_code_2_and_one_line(here, capsys, words, expected):
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line
