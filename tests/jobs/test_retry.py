"""Whose job a folder has: `pixart retry` of a folder with several names, and of one that was moved."""

import pytest

from jobs.cli import main
from pipelines import caption, extract, imports
from pixart_data.commits import Record, write_record

JOBS = {
    "extract": (extract, "[source]\npaths = ['images']\n[image]\n[text]\n"),
    "import": (imports, "path = 'theirs'\nlayout = 'mds'\n"),
    "caption": (caption, "[source]\npaths = ['images']\n"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What the pipelines were asked to do; they do nothing."""
    calls = []
    for pipeline, _ in JOBS.values():

        def run(job, reasons=(), only=None):
            calls.append((job.output, only))
            return []

        monkeypatch.setattr(pipeline, "run", run)
    return calls


def write_run(root, command, output):
    """An output directory with a rejected row."""
    write_record(root, Record("u", "", {}, 1, 0, {"timed_out": 1}, []))
    (root / "job.toml").write_text(f"# pixart {command}\noutput = '{output}'\n{JOBS[command][1]}")


@pytest.mark.parametrize("command", ["extract", "import"])
@pytest.mark.parametrize("name", ["link/256px", "link/text", "straight"])
def test_a_set_may_be_given_by_any_of_its_names(here, asked, command, name):
    for folder in ("256px", "text"):
        write_run(here / "data" / folder, command, here / "data")
    (here / "link").symlink_to("data")
    (here / "straight").symlink_to("data/256px")
    assert main(["retry", name]) == 0
    [(output, only)] = asked
    assert output == str(here / "data")
    assert only == here / "data" / ("text" if name == "link/text" else "256px")


def test_a_table_may_be_given_by_any_of_its_names(here, asked):
    write_run(here / "captions", "caption", here / "captions")
    (here / "link").symlink_to("captions")
    assert main(["retry", "link"]) == 0
    assert asked == [(str(here / "captions"), None)]


@pytest.mark.parametrize("old_is_there", [False, True])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("command", "place", "found", "advice"),
    [
        ("extract", "new/256px", "'{here}/old' and the sets 256px, text", "the set lies now, '{here}/new'"),
        ("import", "new/text", "'{here}/old' and the sets 256px, text", "the set lies now, '{here}/new'"),
        (
            "extract",
            "new/renamed",
            "'{here}/old' and the sets 256px, text",
            "the set lies now, '{here}/new' and name the folder 256px or text again",
        ),
        ("caption", "new", "'{here}/old'", "the run lies now, '{here}/new'"),
    ],
)
def test_the_job_of_another_place_is_not_run(here, asked, capsys, old_is_there, dry_run, command, place, found, advice):
    write_run(here / place, command, here / "old")
    if old_is_there:
        write_run(here / place.replace("new", "old"), command, here / "old")
    assert main(["retry", place, *dry_run]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"pixart retry: {here}/{place}/job.toml: expected the job of this folder, found output = "
        f"{found.format(here=here)}; set output to where {advice.format(here=here)}"
    )
    assert asked == []
    job = here / place / "job.toml"
    job.write_text(job.read_text().replace(f"{here}/old", f"{here}/new"))
    if "renamed" not in place:
        assert main(["retry", place]) == 0
        assert [output for output, _ in asked] == [f"{here}/new"]


def test_an_object_store_is_known_by_its_url(here, asked, capsys):
    from pixart_data.storage import location

    root = location("memory://retried/data/256px")
    write_run(root, "extract", "memory://retried/data/")
    assert main(["retry", "memory://retried/data"]) == 0
    assert [str(only) for _, only in asked] == [str(root)]
    write_run(root, "extract", "memory://retried/old")
    assert main(["retry", "memory://retried/data/256px"]) == 2
    assert "found output = 'memory://retried/old' and the sets 256px, text" in capsys.readouterr().err
