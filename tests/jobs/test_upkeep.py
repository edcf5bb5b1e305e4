"""diff, merge, split and compact as they are typed."""

import os
import re
import shutil

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


def test_parts_of_another_split_are_left_alone(here, capsys):
    split = ["split", "data", "--out", "parts", "--share", "train=0.5", "--share", "val=0.5"]
    assert main(split) == 0
    before = {path: path.read_bytes() for path in (here / "parts").rglob("*.json") if ".lease" not in path.parts}
    for words in (
        ["split", "data", "--out", "parts", "--share", "train=0.7", "--share", "test=0.3"],
        ["split", "data", "--out", "parts", "--share", "val=0.5", "--share", "train=0.5"],
        ["split", "data", "--out", "parts", "--where", "few=original_width_px > 35"],
        ["split", "data/256px", "--out", "parts", "--share", "train=0.5", "--share", "val=0.5"],
    ):
        for more in ([], ["--dry-run"]):
            assert main([*words, *more]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert "parts: expected a new folder, or parts of this split, found" in line
    assert main(split) == 0
    assert {path: path.read_bytes() for path in before} == before
    for part in ("train", "val"):  # as after a kill: not one is done
        for name in ("256px", "text"):
            (here / "parts" / part / name / "manifest.json").unlink()
    assert main(["merge", "data", "--out", "parts/train"]) == 2
    assert "256px: expected a new folder, or what `pixart merge` left there, found the results of `pixart split`" in (
        capsys.readouterr().err
    )
    assert main(split) == 0
    assert main(["verify", "parts/train"]) == 0


def test_a_split_that_was_killed_is_not_gone_on_with_as_another(here, capsys, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pixart_data.links.write_edition", die)
        assert main(["split", "data", "--out", "parts", "--share", "a=0.5"]) == 130
    capsys.readouterr()
    assert main(["split", "data", "--out", "parts", "--share", "b=0.5"]) == 2
    assert "parts/a/256px of another: of other shares or queries" in capsys.readouterr().err
    assert main(["split", "data", "--out", "parts", "--share", "a=0.5"]) == 0


def test_no_part_or_union_is_written_over_what_is_read(here, capsys):
    assert main(["split", "data", "--out", "parts", "--share", "train=0.5"]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for words in (
        ["split", "parts/train", "--out", "parts", "--share", "train=0.5"],
        ["split", "parts/train/256px", "--out", "parts", "--share", "train=0.5"],
        ["merge", "data/256px", "--out", "data"],
        ["merge", "data", "--out", "parts/../data"],
    ):
        for more in ([], ["--dry-run"]):
            assert main([*words, *more]) == 2
            assert "expected a folder of its own, found the dataset" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_set_that_is_not_finished_is_no_dataset_to_go_on_with(here, capsys):
    (here / "copy").mkdir()
    for name in ("256px", "text"):
        shutil.copytree(here / "data" / name, here / "copy" / name)
    (here / "copy/text/manifest.json").unlink()
    assert main(["diff", "data", "copy", "--dry-run"]) == 0
    assert f"diff: {here}/copy/text is not finished" in capsys.readouterr().out
    assert main(["diff", "copy", "data"]) == 3
    assert "text: not finished: " in capsys.readouterr().err
    for words in (["compact", "copy"], ["merge", "data", "copy"], ["split", "copy", "--share", "a=0.5"]):
        for more in ([], ["--dry-run"]):
            assert main([*words, "--out", "out", *more]) == 3
            [line] = capsys.readouterr().err.splitlines()
            assert f"{here}/copy/text: not finished: expected a manifest.json, found none; run" in line
    assert not (here / "out").exists()


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
        (
            ["split", "data", "--out", "p", "--where", "num_tokens > 60"],
            "--where num_tokens > 60: expected NAME=QUERY, found a query without the name of a part; write e.g. "
            "--where 'part=num_tokens > 60'",
        ),
        (["split", "data", "--out", "p", "--where", "bucket == 1"], "found a query without the name of a part; write"),
        (["split", "data", "--out", "p", "--where", "height_px>=9"], "write e.g. --where 'part=height_px>=9'"),
        (["split", "data", "--out", "p", "--where", "row==9"], "write e.g. --where part=row==9"),
        (
            ["split", "data", "--out", "p", "--where", "long=num_tokens > 60"],
            "; num_tokens is a column of text: --set queried_set=text",
        ),
        (["split", "none", "--out", "p", "--share", "a=1"], "none: no such file or folder; check the path"),
        (["merge", "data", "none", "--out", "p"], "none: no such file or folder; check the path"),
        (["compact", "none", "--out", "p"], "none: no such file or folder; check the path"),
        (["diff", "data", "none"], "none: no such file or folder; check the path"),
        (["diff", "none", "data", "--dry-run"], "none: no such file or folder; check the path"),
        (["inspect", "none"], "none: no such file or folder; check the path"),
        (["verify", "none"], "none: no such folder; check the path"),
        (["buckets", "none"], "none: expected images or what pixart wrote, found nothing; check the path"),
        (["compact", "data", "--out", "data"], "output: expected another folder than the dataset's own"),
    ],
)
def test_mistakes_are_exit_code_2_and_one_line(here, capsys, words, expected):
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line


@pytest.mark.parametrize(
    "words",
    [
        ["verify"],
        ["verify", "--dry-run"],
        ["inspect"],
        ["diff", "data"],
        ["merge", "--out", "p"],
        ["split", "--out", "p", "--share", "a=1"],
        ["compact", "--out", "p"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_store_that_cannot_be_read_is_exit_code_4_and_one_line(here, monkeypatch, capsys, words):
    """Without credentials, with an endpoint where nobody answers, and where no host has the name."""
    import s3fs

    place = "s3://bucket/data"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("pixart_data.retries._ATTEMPTS", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    assert main([words[0], place, *words[1:]]) == 4
    assert re.search(f"{place}(/manifest.json)?: cannot read: Unable to locate credentials", _only_line(capsys))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    s3fs.S3FileSystem.clear_instance_cache()
    assert main([words[0], place, *words[1:]]) == 4
    assert "cannot read: Could not connect to the endpoint" in _only_line(capsys)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_web_address_where_nobody_answers_is_one_line(here, monkeypatch, capsys, command):
    monkeypatch.setattr("pixart_data.retries._ATTEMPTS", 1)
    assert main([command, "http://127.0.0.1:9/x"]) == 4
    assert "http://127.0.0.1:9/x: cannot read: " in _only_line(capsys)


def _only_line(capsys):
    [line] = capsys.readouterr().err.splitlines()
    return line
