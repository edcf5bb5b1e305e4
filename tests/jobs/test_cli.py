import subprocess
import sys

import pytest

from jobs import cli


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('output = "o"\n[source]\npath = ["x"]\n', "source.path: unknown key; did you mean 'paths'?"),
        ('output = "o"\n[source]\npaths = "x"\n', "source.paths: expected list, got 'x'"),
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
