import os

import pytest
from pydantic import Field

from pixart_data.config import LocalPath, ModelId, Section, digest, load, resolved_toml
from pixart_data.errors import ConfigError


class Wheel(Section):
    name: str = "wheel"
    spokes: int = Field(default=20, ge=1)


class Paint(Section):
    colour: str = "red"
    shine: float = 0.5
    metallic: bool = False
    layers: list[int] = []


class Bicycle(Section):
    """A job with everything a job has: a section, an optional section, and a list of sections."""

    output: LocalPath
    paint: Paint = Paint()
    basket: Paint | None = None
    wheels: list[Wheel] = []
    motor: ModelId | None = None


def read(*overrides, **given):
    return load(Bicycle, None, overrides, {"output": "o", **given})


def complaints(*overrides, path=None, **given):
    with pytest.raises(ConfigError) as caught:
        load(Bicycle, path, overrides, given)
    return str(caught.value).splitlines()


def test_a_file_is_read_and_the_rest_is_defaults(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('output = "/o"\n[paint]\nshine = 1\n[[wheels]]\nspokes = 3\n[[wheels]]\nname = "räder"\n')
    job = load(Bicycle, path)
    assert job.paint == Paint(shine=1.0)
    assert job.wheels == [Wheel(spokes=3), Wheel(name="räder")]
    assert job.basket is None


def test_set_beats_given_beats_the_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('output = "/file"\n[paint]\ncolour = "file"\nshine = 0.1\nmetallic = true\n')
    job = load(Bicycle, path, ["paint.colour=set"], {"paint": {"colour": "given", "shine": 0.2}})
    assert job.paint == Paint(colour="set", shine=0.2, metallic=True)
    assert job.output == "/file"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("paint.colour=blue", Paint(colour="blue")),
        ("paint.colour=dark blue, nearly black", Paint(colour="dark blue, nearly black")),
        ('paint.colour="12"', Paint(colour="12")),
        ("paint.colour=a=b", Paint(colour="a=b")),
        ("paint.colour=", Paint(colour="")),
        ("paint.shine=1e-3", Paint(shine=1e-3)),
        ("paint.metallic=true", Paint(metallic=True)),
        ("paint.layers=[1, 2]", Paint(layers=[1, 2])),
        ('paint={colour = "green", shine = 0.0}', Paint(colour="green", shine=0.0)),
    ],
)
def test_set_reads_toml_and_else_a_bare_string(override, expected):
    assert read(override).paint == expected


def test_set_opens_a_section_that_is_not_there_and_the_last_one_wins():
    assert read("basket.colour=brown", "basket.shine=0.1", "basket.colour=black").basket == Paint(
        colour="black", shine=0.1
    )


@pytest.mark.parametrize("override", ["paint", "=3", "paint.=3", ""])
def test_set_without_key_or_value_says_what_it_wants(override):
    assert complaints(override, output="o") == [
        f"--set {override}: expected section.key=value, e.g. --set cluster.num_workers=2"
    ]


def test_set_below_a_value_is_refused():
    [line] = complaints("output.deeper=3", output="o")
    assert line == "--set output.deeper=3: output is a value, not a section"


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("paint.metallic=1", "paint.metallic", "1"),
        ("paint.shine=high", "paint.shine", "'high'"),
        ("paint.shine='0.5'", "paint.shine", "'0.5'"),
        ("paint.shine=true", "paint.shine", "True"),
        ("paint.layers=[true]", "paint.layers.0", "True"),
        ("paint.layers=[1.0]", "paint.layers.0", "1.0"),
        ("paint.colour=7", "paint.colour", "7"),
        ("paint=3", "paint", "3"),
    ],
)
def test_types_are_strict(override, key, found):
    [line] = complaints(override, output="o")
    assert line.startswith(f"command line: {key}: expected ")
    assert line.endswith(f", got {found}")


def test_every_problem_gets_a_line_that_names_the_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[paint]\ncolor = 'red'\nshine = 'no'\n[[wheels]]\n[[wheels]]\nspokes = 0\n")
    lines = complaints(path=path)
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert f"{path}: paint.color: unknown key; did you mean 'colour'?" in lines
    assert f"{path}: wheels.1.spokes: expected greater than or equal to 1, got 0" in lines
    assert f"{path}: output: required, and missing; add it to the job file or pass --set output=..." in lines


def test_a_key_with_a_flag_is_asked_for_by_it():
    with pytest.raises(ConfigError) as caught:
        load(Bicycle, None, flags={"output": "--out FOLDER", "paint.colour": "--colour NAME"})
    assert (
        str(caught.value) == "command line: output: required, and missing; add it to the job file or pass --out FOLDER"
    )


def test_a_typo_in_a_list_of_sections_is_placed_and_mended():
    [line] = complaints(output="o", wheels=[{"nam": "front"}])
    assert line == "command line: wheels.0.nam: unknown key; did you mean 'name'?"


def test_a_typo_in_an_optional_section_is_mended():
    [line] = complaints("basket.shin=1", output="o")
    assert line == "command line: basket.shin: unknown key; did you mean 'shine'?"


def test_a_typo_of_a_required_key_is_complained_of_once():
    assert complaints(outptu="o") == ["command line: outptu: unknown key; did you mean 'output'?"]


def test_a_key_like_no_other_lists_the_known_ones():
    [line] = complaints("paint.zzz=1", output="o")
    assert line == "command line: paint.zzz: unknown key; known: colour, shine, metallic, layers"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"output = ", "not valid TOML"),
        (b'output = "\xff"', "cannot be read as a job file"),
        (None, "no such job file"),
    ],
)
def test_a_file_that_is_no_job_file_is_one_line(tmp_path, content, expected):
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    [line] = complaints(path=path)
    assert line.startswith(f"{path}: {expected}")


def test_a_folder_is_no_job_file(tmp_path):
    [line] = complaints(path=tmp_path)
    assert "cannot be read as a job file" in line


def test_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    read_output = {text: read(output=text).output for text in ("o", "./a/../o", "~/o", "/o", "s3://bucket/o")}
    assert read_output == {
        "o": f"{tmp_path}/o",
        "./a/../o": f"{tmp_path}/o",
        "~/o": "/home/someone/o",
        "/o": "/o",
        "s3://bucket/o": "s3://bucket/o",
    }


def test_hub_ids_stay_and_folders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("owner/here")
    assert read(motor="owner/elsewhere").motor == "owner/elsewhere"
    assert read(motor="gpt2").motor == "gpt2"
    assert read(motor="owner/here").motor == f"{tmp_path}/owner/here"
    assert read(motor="./owner/elsewhere").motor == f"{tmp_path}/owner/elsewhere"
    assert read(motor="a/b/c").motor == f"{tmp_path}/a/b/c"
    assert read(motor="/a/b").motor == "/a/b"


def test_a_resolved_job_repeats_itself_anywhere(tmp_path, monkeypatch):
    job = read("paint.colour='\"quoted\" \\ ü\n'", wheels=[{"name": "front"}, {"spokes": 7}], basket={}, motor="./m")
    path = tmp_path / "resolved.toml"
    path.write_text(resolved_toml(job), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load(Bicycle, path) == job
    assert "spokes = 20" in path.read_text(encoding="utf-8")


def test_a_job_is_frozen():
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="frozen"):
        read().output = "elsewhere"


def test_a_digest_depends_on_content_and_not_on_order():
    one = digest({"a": 1, "b": {"c": [1, 2], "d": None}})
    assert one == digest({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert one != digest({"a": 1, "b": {"c": [2, 1], "d": None}})
    assert one != digest({"a": "1", "b": {"c": [1, 2], "d": None}})
    # pinned: a digest that moved would redo every unit of every dataset
    assert one == "6146dd4938e3bf91d7c43fbcd7072936d0fc295ac5f55e80da21fad03fa23831"
