"""Promises made in more than one place: commands and their functions, job files, the README and the packaging."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from jobs.cli import COMMANDS, parse, parser, read_job, resolve
from pixart_data.config import Section, load, resolved_toml

ROOT = Path(__file__).parent.parent
JOB_FILES = sorted([*(ROOT / "jobs/files").glob("*.toml"), *(ROOT / "jobs/demo").glob("*.toml")])
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "jobs/demo/run.sh"])


def command_of(path):
    return path.stem.split("_")[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_command_resolves(name):
    command = COMMANDS[name]
    assert issubclass(resolve(command.config, command.extra), Section)
    assert callable(resolve(command.function, command.extra))


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_job_file_loads_and_its_resolved_form_repeats_it(path, tmp_path):
    command = COMMANDS[command_of(path)]
    cls = resolve(command.config, command.extra)
    job = load(cls, path)
    again = tmp_path / "job.toml"
    again.write_text(resolved_toml(job))
    assert load(cls, again) == job


def test_every_stage_has_job_files():
    stages = {"caption", "stats", "extract", "train", "sample"}
    assert {command_of(path) for path in (ROOT / "jobs/files").glob("*.toml")} == stages | {"fetch", "filter"}
    assert {command_of(path) for path in (ROOT / "jobs/demo").glob("*.toml")} == stages


def documented_commands():
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            match = re.match(r"^\s*(?:\$ |run )?(pixart [a-z].*?)(?:\s{2,}.*|\s*#.*)?$", line)
            if match and "THIS_FILE" not in line and not re.match(r"pixart \w+:", match[1]):
                yield pytest.param(match[1], id=f"{document.name}: {match[1]}"[:90])


@pytest.mark.parametrize("line", documented_commands())
def test_documented_command_parses(line):
    words = [word for word in shlex.split(line.partition(" > ")[0])[1:] if word not in ("...", "\\")]
    parse(words)


def test_documented_commands_are_found():
    assert len(list(documented_commands())) > 20


def test_dependencies_are_constrained_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert "torch==2.13.0" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower() for name in wanted}
    assert names - {"pixart-toolkit"} <= pinned


def test_training_needs_no_data_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.match(r"\w+", name)[0] for name in extras["train"]} == {"torch", "safetensors"}


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*COMMANDS, "submit"])


def test_job_can_be_read_without_a_file(tmp_path):
    args = parser().parse_args(["stats", "a.parquet", "b=c.parquet", "--out", str(tmp_path)])
    job = read_job(args)
    assert [caption_set.name for caption_set in job.sets] == ["a", "b"]


def test_the_reference_of_job_files_is_up_to_date():
    from jobs.reference import reference

    assert (ROOT / "docs/jobs.md").read_text() == reference(), "run: python -m jobs.reference > docs/jobs.md"


def test_links_in_documents_lead_somewhere():
    links = [
        (document, link.split("#")[0])
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text())
        if "://" not in link
    ]
    assert len(links) > 8
    missing = [(d.name, link) for d, link in links if link and not (d.parent / link).exists()]
    assert missing == []


def test_every_key_of_a_job_file_is_explained():
    lines = (ROOT / "docs/jobs.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `") and line.endswith("|  |")] == []
