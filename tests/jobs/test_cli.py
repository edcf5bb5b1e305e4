import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.arguments import FLAGS, GIVEN


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('output = "o"\n[source]\npath = ["x"]\n', "source.path: unknown key; did you mean 'paths'?"),
        ('output = "o"\n[source]\npaths = "x"\n', "source.paths: expected a list, got 'x'; write ['x']"),
        ('output = "o"\n[source]\npaths = ["x"]\nrows_per_unit = 0\n', "greater than or equal to 1, got 0"),
        ('[source]\npaths = ["x"]\n', "output: required, and missing"),
        (
            'output = "o"\n[source]\npaths = ["x"]\n[captioner]\ntemperature = "hot"\n',
            "captioner.temperature: expected",
        ),
        ('output = "o"\n[source]\npaths = ["x"]\n[captioner]\nprompt_with_caption = "hm"\n', "{caption}"),
        ("output = \n", "not valid TOML"),
    ],
)
def test_a_wrong_job_file_is_one_line_that_names_the_key(capsys, tmp_path, text, expected):
    path = tmp_path / "job.toml"
    path.write_text(text)
    code, _, err = run(capsys, "caption", path)
    assert code == 2
    [line] = err.strip().splitlines()
    assert line.startswith(f"pixart caption: {path}: ")
    assert expected in line


def test_several_problems_are_several_lines(capsys, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('output = 3\n[source]\npaths = ["x"]\nlayot = "tar"\n')
    code, _, err = run(capsys, "caption", path)
    assert code == 2
    assert len(err.strip().splitlines()) == 2
    assert "did you mean 'layout'?" in err


@pytest.mark.parametrize(("address", "mode"), [("head:6379", "token"), (None, None)])
def test_a_running_cluster_is_shown_the_token_before_ray_is_imported(monkeypatch, tmp_path, pictures, address, mode):
    (tmp_path / "token").write_text("0" * 64)
    for name, value in {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_ADDRESS": address}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # for it to be put back as it was
    monkeypatch.delenv("RAY_AUTH_MODE")
    seen, resolve = {}, cli.resolve

    def watched(name, extra):
        seen[name] = os.environ.get("RAY_AUTH_MODE")
        return (lambda job, dry_run: None) if name == "jobs.stages:caption" else resolve(name, extra)

    monkeypatch.setattr(cli, "resolve", watched)
    path = tmp_path / "job.toml"
    path.write_text(f'output = "{tmp_path}/o"\n[source]\npaths = ["{pictures}"]\n')
    assert cli.main(["caption", str(path)]) == 0
    assert seen["jobs.stages:caption"] == mode


def test_a_missing_job_file_is_named(capsys, tmp_path):
    code, _, err = run(capsys, "train", tmp_path / "no.toml")
    assert code == 2
    assert "no such job file" in err


def test_set_overrides_the_file_and_is_checked_alike(capsys, pictures, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(f'output = "{tmp_path}/o"\n[source]\npaths = ["{pictures}"]\n')
    code, out, _ = run(capsys, "caption", path, "--set", "source.rows_per_unit=5", "--dry-run")
    assert code == 0
    assert "3 shards, 0 done, 3 to do" in out
    code, _, err = run(capsys, "caption", path, "--set", "source.rows_per_units=5", "--dry-run")
    assert code == 2
    assert "did you mean 'rows_per_unit'?" in err
    code, _, err = run(capsys, "caption", path, "--set", "nonsense")
    assert code == 2
    assert "expected section.key=value" in err


def test_dry_run_writes_nothing(capsys, pictures, tmp_path):
    code, _, _ = run(
        capsys, "caption", "--set", f"output={tmp_path}/o", "--set", f'source.paths=["{pictures}"]', "--dry-run"
    )
    assert code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there_is_named(capsys, tmp_path):
    code, _, err = run(
        capsys, "caption", "--set", f"output={tmp_path}/o", "--set", f'source.paths=["{tmp_path}/*.tar"]'
    )
    assert code == 2
    assert f"{tmp_path}/*.tar" in err


def test_stats_needs_tables(capsys, tmp_path):
    code, _, err = run(capsys, "stats", "--out", tmp_path / "report")
    assert code == 2
    assert "sets" in err
    code, _, err = run(capsys, "stats", tmp_path / "no.parquet", "--out", tmp_path / "report")
    assert code == 2
    assert "no such file or folder" in err


def test_two_tables_of_one_name_are_told_apart_by_hand(capsys, tmp_path):
    code, _, err = run(capsys, "stats", "a/x.parquet", "b/x.parquet", "--out", tmp_path)
    assert code == 2
    assert "'x' twice" in err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_looking_at_nothing_says_so(capsys, tmp_path, command):
    code, _, err = run(capsys, command, tmp_path)
    assert code == 3
    assert str(tmp_path) in err


@pytest.mark.parametrize("words", [["trian", "job.toml"], ["submit", "trian", "job.toml"]])
def test_a_mistyped_command_is_named_with_the_one_that_was_meant(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "no command trian; did you mean train?" in capsys.readouterr().err


def test_sampling_without_prompts_says_what_to_add(capsys, tmp_path):
    code, _, err = run(capsys, "sample", tmp_path)
    assert code == 2
    assert "prompt" in err


def test_a_missing_package_names_the_extra(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(f'output = "{tmp_path}/o"\n[source]\npaths = ["{tmp_path}"]\n')
    code = (
        f"import sys; sys.modules['ray'] = None; from jobs.cli import main; sys.exit(main(['caption', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "pixart caption: package ray is not installed; pip install 'pixart-toolkit[data]'"


def test_help_starts_without_torch_and_ray():
    code = (
        "import sys; from jobs.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "submit" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_bug(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({f"column_{i}": [i] for i in range(5000)}), tmp_path / "wide.parquet")
    command = [sys.executable, "-m", "jobs.cli", "inspect", str(tmp_path / "wide.parquet")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_a_missing_section_says_how_it_looks(capsys):
    code, _, err = run(capsys, "caption", "--set", "output=o")
    assert code == 2
    assert "source: required, and missing; add a section [source] to the job file, with paths, layout, root ..." in err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["compact", "d"], ["output: required, and missing; add it to the job file or pass --out FOLDER"]),
        (["merge", "d", "e"], ["output: required, and missing; add it to the job file or pass --out FOLDER"]),
        (["split", "d", "--share", "a=1"], ["output: required, and missing; .* pass --out FOLDER$"]),
        (
            ["import", "d", "--out", "x"],
            ["layout: required, .* pass --from reference, mds or diffusers$"],
        ),
        (["export", "d"], ["layout: .* pass --to reference or mds$", "output: .* pass --out FOLDER$"]),
        (
            ["fetch", "--set", "downloads.concurrency=4"],
            [r"output: required, and missing; add it to the job file or pass --set output=\.\.\.$"],
        ),
    ],
)
def test_what_is_missing_is_asked_for_by_its_flag(capsys, words, advice):
    code, _, err = run(capsys, *words)
    assert code == 2
    for line in advice:
        assert re.search(line, err, re.MULTILINE)


@pytest.mark.parametrize(("command", "key"), [(name, key) for name, keys in FLAGS.items() for key in keys])
def test_a_flag_that_is_advised_gives_its_key(command, key):
    flag = FLAGS[command][key].split()[0]
    words = {"merge": ["a", "b"], "stats": ["a.parquet"]}.get(command, ["a"])
    _, args = cli.parse([command, *words, flag, "mds"])
    _, given = GIVEN[command](args)
    assert given[key] in ("mds", ["mds"])


@pytest.mark.parametrize("command", ["fetch", "caption", "extract", "train"])
def test_a_command_without_its_job_file_says_what_to_type(capsys, command):
    code, _, err = run(capsys, command)
    assert code == 2
    [line] = err.splitlines()
    assert f"expected a job file, found none; type pixart {command} JOB.toml; to start from: " in line
    assert list(Path(line.rpartition(": ")[2]).glob(f"{command}*.toml")), "the folder that it names has one"


@pytest.mark.parametrize(("command", "name"), [("train", "config.toml"), ("caption", "job.toml")])
def test_the_directory_of_a_run_in_place_of_a_job_file_names_the_one_in_it(capsys, tmp_path, command, name):
    code, _, err = run(capsys, command, tmp_path)
    assert code == 2
    assert f"{tmp_path}: expected a job file, found a directory; to start from: " in err
    (tmp_path / name).write_text("")
    code, _, err = run(capsys, command, tmp_path)
    assert code == 2
    assert f"expected a job file, found the directory of a run; type pixart {command} {tmp_path / name}\n" in err


@pytest.mark.parametrize(("command", "flag"), [("convert", "--to"), ("export", "--to"), ("import", "--from")])
def test_a_wrong_value_of_a_flag_is_complained_of_by_the_flag(capsys, command, flag):
    code, _, err = run(capsys, command, "d", flag, "diffuser", "--out", "x")
    assert code == 2
    assert err.startswith(f"pixart {command}: {flag}: layout: expected '")
    assert err.endswith(", got 'diffuser'\n")


def test_an_empty_list_is_said_in_words(capsys):
    code, _, err = run(capsys, "stats")
    assert code == 2
    assert "sets: expected at least one, found none" in err


def test_an_unknown_flag_shows_the_usage_of_its_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "run", "--num-steps", "5"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "usage: pixart sample" in err
    assert "keys of the job file are set with --set KEY=VALUE" in err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("pixart 0.")


@pytest.mark.parametrize(
    ("section", "name", "words"),
    [
        ("image", "t5", "image.model: expected a model of kind Autoencoder, found t5"),
        ("text", "vae", "text.model: expected a model of kind t5, found AutoencoderKL"),
        ("image", "", "image.model: .* holds no model: its config.json cannot be read"),
    ],
)
def test_a_model_of_another_kind_is_found_before_any_work(capsys, miniatures, pictures, tmp_path, section, name, words):
    folder = miniatures.get(name, str(pictures))
    words = [f"output={tmp_path}/o", f'source.paths=["{pictures}"]', f"{section}.model={folder}"], words
    code, _, err = run(capsys, "extract", "--dry-run", *(w for o in words[0] for w in ("--set", o)))
    assert code == 2
    assert re.search(words[1], err)


def test_a_mistake_in_text_is_found_before_the_images_are_encoded(capsys, miniatures, pictures, tmp_path):
    settings = [
        f"output={tmp_path}/o", f'source.paths=["{pictures}"]', f"image.model={miniatures['vae']}",
        f"text.model={miniatures['t5']}", f"captions.path={tmp_path}/none.parquet",
    ]  # fmt: skip
    code, _, err = run(capsys, "extract", *(w for o in settings for w in ("--set", o)))
    assert code == 2
    assert "captions.path: no such file" in err
    assert not (tmp_path / "o").exists()
