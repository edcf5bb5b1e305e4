"""`pixart stats` as it is typed: one run through Ray with NLTK's answer, and one clear line for whatever is wrong."""

import json
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from pixart_data.commits import COMMITS
from pixart_data.corpora import from_json

CAPTIONS = [
    "A brown dog lies on a red sofa. The sofa stands to the left of a window.",
    "Two children play with a ball in the park, and a woman looks on.",
    None,
    "An old train waits at a small station under a cloudy sky.",
]


def table(path, captions, column="caption", **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: captions, **columns}), path)
    return path


def run(capsys, *words):
    code = cli.main(["stats", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("pixart")]


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    """NLTK finds none of its files, and no network is asked."""
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "no_data")])

    def unreachable(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)


def reference(captions):
    """Count as the definition says it, with NLTK as it is installed."""
    import nltk

    return sum(
        tag in ("NN", "NNS", "NNP", "NNPS")
        for text in captions
        if text
        for _, tag in nltk.pos_tag(nltk.word_tokenize(text))
    )


def test_a_run_through_ray_gives_nltks_figures_and_a_second_one_does_nothing(tmp_path, pixart, nltk_data, capsys):
    for name, start in (("one", 0), ("two", 1)):
        table(tmp_path / "set" / f"{name}.parquet", CAPTIONS[start:], "TEXT")
    (tmp_path / "alt.txt").write_text("dog sofa\nred train station\n")
    (tmp_path / "de.txt").write_text("Ein brauner Hund liegt auf dem roten Sofa.\nZwei Kinder spielen mit dem Ball.\n")
    sets = [f"dense={tmp_path}/set/*.parquet", tmp_path / "alt.txt", tmp_path / "de.txt"]
    words = [*sets, "--column", "TEXT", "--out", tmp_path / "report", "--set", "cluster.num_workers=1"]
    done = pixart("stats", *words, env={**os.environ, "NLTK_DATA": str(nltk_data)})
    assert done.returncode == 0, done.stderr
    assert "stats: 11 in = 9 out + 2 rejected (no_caption 2)" in done.stdout
    assert "LAION-LLaVA (paper)" in done.stdout
    assert "captions/s" in done.stderr
    assert done.stderr.index("noun tagger: ") < done.stderr.index("stats: 4 shards, 0 done, 4 to do")
    assert "stats: de: 100% of the captions looked at are not in English" in done.stderr
    dense, alt, german = from_json(json.loads((tmp_path / "report/stats.json").read_text()))
    assert (dense.name, alt.name, german.name) == ("dense", "alt", "de")
    assert [corpus.language["flagged"] for corpus in (dense, alt, german)] == [False, False, True]
    assert (dense.stats.num_captions, dense.stats.num_empty, alt.stats.num_captions) == (5, 2, 2)
    assert dense.stats.total_nouns == reference([*CAPTIONS, *CAPTIONS[1:]])
    assert not dense.stats.approximate
    assert (tmp_path / "report/figures/ranks.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "report").rglob("*") if path.is_file()}
    assert run(capsys, *words)[0] == 0
    results = {COMMITS, "counts", "measures", "figures", "stats.json", "report.html", "manifest.json"}
    kept = {p: time for p, time in before.items() if p.relative_to(tmp_path / "report").parts[0] in results}
    assert len(kept) >= 4 * 3 + 4
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((tmp_path / "report" / COMMITS).iterdir())) == 4
    assert cli.main(["verify", str(tmp_path / "report")]) == 0
    assert cli.main(["inspect", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert "report.html" in shown
    assert "measures/*.parquet, 4 part(s)" in shown


def test_without_nltks_data_the_files_are_named_and_what_to_do(tmp_path, capsys, no_data):
    code, _, lines = run(capsys, table(tmp_path / "a.parquet", CAPTIONS), "--out", tmp_path / "report")
    assert code == 2
    assert "noun tagger: expected NLTK's data files" in lines[0]
    for advice in ("pixart stats --download-nltk", "NLTK_DATA", "--approximate"):
        assert advice in lines[0]
    assert sum("averaged_perceptron_tagger_eng.weights.json, sha256 789e8e35" in line for line in lines) == 1
    assert not (tmp_path / "report").exists()


def test_a_download_that_fails_says_why(tmp_path, capsys, no_data):
    code, _, lines = run(capsys, table(tmp_path / "a.parquet", CAPTIONS), "--download-nltk", "--out", tmp_path / "r")
    assert code == 2
    assert "download failed: raw.githubusercontent.com: unreachable" in lines[0]
    code, _, lines = run(capsys, "--download-nltk")
    assert code == 2
    assert "download failed" in lines[0]


def test_a_download_alone_needs_no_captions_and_says_where_the_data_is(capsys, nltk_data):
    code, out, _ = run(capsys, "--download-nltk")
    assert code == 0
    assert out.strip() == f"stats: NLTK's data is in {nltk_data}"
    code, out, _ = run(capsys, "--download-nltk", "--dry-run")
    assert (code, out.strip()) == (0, "stats: would fetch NLTK's data, if it is missing, as NLTK does")


def bad(tmp_path, kind):
    path = tmp_path / f"{kind}.parquet"
    if kind == "truncated":
        data = table(path, CAPTIONS * 100).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "numbers":
        table(path, [1, 2, 3])
    elif kind == "blank":
        path = tmp_path / "blank.txt"
        path.write_bytes(b"")
    elif kind == "latin":
        path = tmp_path / "latin.txt"
        path.write_bytes("ein caf\xe9\n".encode("latin-1"))
    else:
        table(path, CAPTIONS, "text", url=["u"] * len(CAPTIONS))
    return path


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        (
            "missing",
            2,
            "expected a column 'caption', found text, url; name another one with --column, in a job file as `column` "
            "of the set 'missing'",
        ),
        ("numbers", 2, "expected text in the column 'caption', found int64; columns of text: none"),
        ("truncated", 3, "it is damaged, cut off or something else: write or copy it again, or leave it out"),
        ("empty", 3, "empty.parquet: cannot be read as Parquet: Parquet file size is 0 bytes; it is damaged, cut off"),
        ("blank", 3, "blank: expected captions in {path}, found no rows; name what has some, or leave the set out"),
        ("latin", 3, "latin.txt: expected text in UTF-8, found the byte 0xe9 in line 1; convert it first"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, kind, code, expected):
    path = bad(tmp_path, kind)
    found, _, lines = run(capsys, path, "--approximate", "--out", tmp_path / "report", "--dry-run")
    assert found == code
    [line] = lines
    assert expected.format(path=path) in line
    assert not (tmp_path / "report").exists()


def test_one_file_as_two_sets_is_one_clear_line(tmp_path, capsys):
    path = table(tmp_path / "a.parquet", CAPTIONS)
    code, _, [line] = run(capsys, f"x={path}", f"y={path}", "--approximate")
    assert code == 2
    assert f"sets: expected different captions, found column 'caption' of {path} as 'x' and as 'y'; remove one" in line


def test_a_column_with_a_job_file_is_refused(tmp_path, capsys, job_file):
    job = job_file("stats", {"output": str(tmp_path / "r"), "sets": [{"name": "a", "path": "/a.parquet"}]})
    code, _, [line] = run(capsys, job, "--column", "text")
    assert code == 2
    assert "--column: expected it with tables given by hand, found a job file" in line


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/a.parquet", "a"),
        ("data/v1.5", "v1.5"),
        ("data/laion/*.parquet", "laion"),
        ("data/laion/*/part*.jsonl", "laion"),
        ("s3://bucket/captions/", "captions"),
        ("texts.txt", "texts"),
        ("mine=a.parquet", "mine"),
    ],
)
def test_sets_given_by_hand_are_named_after_what_they_are(path, name):
    _, args = cli.parse(["stats", path, "--approximate", "--tokenizer", "/t5"])
    job = cli.read_job(args)
    assert [caption_set.name for caption_set in job.sets] == [name]
    assert (job.approximate, job.tokenizer, job.download_nltk) == (True, "/t5", False)
    assert job.output.endswith("/report")


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a dog\n\na cat\n")
    code, out, _ = run(capsys, tmp_path / "a.txt", "--approximate", "--out", tmp_path / "report", "--dry-run")
    assert code == 0
    assert "stats: 1 shards, 0 done, 1 to do" in out
    assert "stats: 3 rows, 0 done, 3 to do" in out
    assert not (tmp_path / "report").exists()
