"""The stage of `stats`, called directly: what it counts and keeps, whatever comes in and whenever it is killed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import stats
from pipelines.config import Stats
from pipelines.driver import make_plan
from pipelines.facts import Facts, LanguageSample
from pipelines.findings import read_findings, write_findings
from pipelines.sets import find_sets
from pixart_data import captions as module
from pixart_data.commits import COMMITS, Record, read_records, sweep, write_record
from pixart_data.config import digest, load
from pixart_data.corpora import notes
from pixart_data.errors import ConfigError, DataError
from pixart_data.lemmas import Lemmatizer
from pixart_data.listings import pair_table
from pixart_data.quality import MEASURES, Totals
from pixart_data.verification import verify

pytestmark = pytest.mark.usefixtures("_undrawn")

DENSE = [
    "A brown dog lies on a red sofa. The sofa stands to the left of a window.",
    "Two children play with a ball in the park, and a woman looks on.",
    "An old train waits at a small station under a cloudy sky.",
    "The image features a cup of coffee and a book on a wooden table.",
]


class Figure:
    """In place of a figure: those of a report take longer to draw than all else here."""

    def png(self, source):
        return b"\x89PNG " + source.encode()


@pytest.fixture
def page():
    """For tests that look at the page; it has no figures."""


@pytest.fixture
def _undrawn(request, monkeypatch):
    monkeypatch.setattr("pixart_data.plots.figures", lambda corpora: {"ranks": Figure()})
    monkeypatch.setattr("pixart_data.reports.figures", lambda corpora: {})
    if "page" not in request.fixturenames:
        monkeypatch.setattr("pixart_data.reports.html_page", lambda corpora, gallery=(): f"{len(corpora)} sets")


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def job(tmp_path, *sets, **given):
    everything = {"output": str(tmp_path / "report"), "sets": list(sets), "approximate": True, **given}
    return load(Stats, None, [], everything)


def one(path, name="one", **given):
    return {"name": name, "path": str(path), **given}


def do(made):
    """Do what is left of a job as the driver does, in this process; return the sets of its report by name."""
    sets = find_sets(made)
    run = stats.prepare(made, sets, download=False)
    plan = make_plan(run)
    stage = run.build() if plan.todo else None
    for unit, settings in plan.todo:
        record = replace(stage(unit, lambda rows, rejected: None), settings=settings, digest=digest(settings))
        write_record(run.root, record)
    records = read_records(run.root)
    write_findings(made, sets, [records[unit.id] for unit in run.units])
    return {corpus.name: corpus for corpus in read_findings(run.root)}


def parts(made):
    """Return the content of the tables of a finished job, by the unit they are of."""
    root = Path(made.output)
    return {
        (record.unit, file.path.split("/")[0]): pq.read_table(root / file.path)
        for record in read_records(root).values()
        for file in record.files
    }


def test_sets_whose_names_differ_in_signs_alone_are_kept_apart(tmp_path):
    first = table(tmp_path / "one.parquet", caption=["a red house"])
    second = table(tmp_path / "two.parquet", caption=["a dog and a cat", "a tree"])
    found = do(job(tmp_path, one(first, "原文"), one(second, "标题")))
    assert {name: corpus.stats.num_captions for name, corpus in found.items()} == {"原文": 1, "标题": 2}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_every_kind_of_file_gives_the_same_figures(tmp_path, suffix):
    path = tmp_path / f"captions{suffix}"
    if suffix == ".parquet":
        table(path, text=pa.array(DENSE, pa.large_string()))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": caption}) + "\n" for caption in DENSE))
    else:
        path.write_text("\r\n".join(DENSE), encoding="utf-8-sig")
    found = do(job(tmp_path, one(path, column="text")))["one"]
    expected = {"brown": 0, "dog": 1, "sofa": 2, "window": 1, "train": 1, "table": 1}
    counts = dict(found.top)
    assert {noun: counts.get(noun, 0) for noun in expected} == expected
    assert (found.stats.num_captions, found.stats.num_empty) == (4, 0)


def test_a_file_cut_into_units_gives_what_the_whole_gives(tmp_path, monkeypatch):
    path = table(tmp_path / "captions.parquet", caption=[*DENSE * 5, None, " ", *DENSE[:3]])
    whole = do(job(tmp_path, one(path)))["one"]
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 1)  # a row group of more than five rows is cut
    cut = job(tmp_path, one(path), output=str(tmp_path / "cut"))
    assert len(find_sets(cut).units) == 5
    same = {"language": {}}  # of which a sample of each unit is looked at
    assert replace(do(cut)["one"], **same) == replace(whole, **same)
    assert (whole.stats.num_captions, whole.stats.num_empty) == (23, 2)
    assert whole.rejections == {"no_caption": 2}


def test_rows_are_accounted_for(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"caption": "a dog"}\n{"caption": null}\n{"caption": 7}\nno JSON\n{"caption": "  "}\n')
    found = do(job(tmp_path, one(path)))["one"]
    [record] = read_records(tmp_path / "report").values()
    assert (record.rows_in, record.rows_out, record.rejected) == (5, 1, {"no_caption": 2, "bad_row": 2})
    assert found.rejections == {"no_caption": 2, "bad_row": 2}  # a null caption and a blank one: one rule
    assert "one: 2 null or blank captions and 2 damaged rows are not counted." in notes([found])
    assert (found.stats.num_captions, found.stats.num_empty) == (1, 4)


def test_the_measures_of_every_caption_are_kept_with_its_key(tmp_path):
    path = table(tmp_path / "captions.parquet", caption=[DENSE[0], None, "a dog"], key=["s/1", "s/2", "s/3"])
    made = job(tmp_path, one(path))
    do(made)
    rows = parts(made)["one--captions", "measures"].to_pylist()
    assert [row["key"] for row in rows] == ["s/1", "s/2", "s/3"]
    assert set(rows[0]) == {"key", *MEASURES.names, "failures"}
    assert rows[0]["num_spatial"] >= 1
    assert rows[1] == {**dict.fromkeys(rows[1]), "key": "s/2", "failures": ["empty"]}
    assert "too_short" in rows[2]["failures"]
    without = job(tmp_path, one(path), output=str(tmp_path / "without"), measures=False)
    assert do(without) == do(made)
    assert [folder for _, folder in parts(without)] == ["counts"]


def run_of_captions(tmp_path, **columns):
    """A table as `caption` writes it."""
    rows = {
        "key": [f"s/{i}" for i in range(5)],
        "caption": [*DENSE, None],
        "raw_caption": ["dog sofa", None, "train station", " ", "lost picture"],
        "error": [None, None, None, None, "truncated_image"],
        "finish_reason": ["stop", "length", "stop", "stop", None],
        "prompt": ["Describe this image"] * 5,
        "width_px": [640, 512, 1024, 100, None],
        "height_px": [480, 512, 256, 100, None],
    }
    return table(tmp_path / "captions.parquet", **rows, **columns)


def test_raw_captions_beside_their_own_are_counted_and_compared(tmp_path):
    made = job(tmp_path, one(run_of_captions(tmp_path), "dense"), threshold=0)
    found = do(made)
    assert list(found) == ["dense-raw", "dense"]
    assert [corpus.stats.num_captions for corpus in found.values()] == [3, 4]
    dense, raw = found["dense"], found["dense-raw"]
    assert dense.gained_over == "dense-raw"
    gained = {noun: (here, there) for noun, here, there in dense.gained}
    assert gained["window"] == (1, 0)
    assert "dog" not in gained
    assert dense.rejections == {"truncated_image": 1}
    assert raw.rejections == {"no_caption": 2}  # one null, one blank
    assert dense.gate["truncated"] == 1  # cut off by the limit
    assert dense.frames["num_images"] == 4
    assert dense.frames["num_without_size"] == 1
    assert raw.frames is None  # they are the same pictures


def test_captions_and_raw_ones_are_compared_on_the_images_that_have_both(tmp_path):
    made = job(tmp_path, one(run_of_captions(tmp_path), "dense"))
    found = do(made)
    dense, raw = found["dense"].pairs, found["dense-raw"].pairs
    assert dense["num_captions"] == raw["num_captions"] == 2
    both = [row for row in parts(made)["dense--captions", "measures"].to_pylist() if row["key"] in ("s/0", "s/2")]
    assert dense["num_nouns"] == sum(row["num_nouns"] for row in both)
    assert raw["num_nouns"] == 4
    assert "Nouns on the 2 images with both" in pair_table(found["dense"], found["dense-raw"])


@pytest.mark.parametrize("named", [True, False])
def test_a_raw_set_that_the_job_names_itself_is_the_one_compared_with(tmp_path, named):
    path = run_of_captions(tmp_path)
    sets = [one(path, "alt text", column="raw_caption"), one(path, "dense")]
    found = do(job(tmp_path, *(sets if named else sets[1:])))
    assert list(found) == (["alt text", "dense"] if named else ["dense-raw", "dense"])
    assert found["dense"].gained_over == ("alt text" if named else "dense-raw")
    assert list(found.values())[0].frames is None


def test_raw_captions_are_left_out_on_request_and_where_there_are_none(tmp_path):
    path = run_of_captions(tmp_path)
    assert list(do(job(tmp_path, one(path, "dense", raw_column="")))) == ["dense"]
    bare = table(tmp_path / "bare.parquet", caption=DENSE, raw_caption=pa.nulls(4, pa.string()))
    found = do(job(tmp_path, one(bare, "bare"), output=str(tmp_path / "bare")))
    assert (list(found), found["bare"].gained_over) == (["bare"], None)
    assert {unit.set_name for unit in find_sets(job(tmp_path, one(bare, "bare"))).units} == {"bare"}


def test_raw_captions_beside_several_columns_are_one_set(tmp_path):
    path = run_of_captions(tmp_path, caption_short=["a dog", "two children", None, "a cup", None])
    found = do(job(tmp_path, one(path, "long"), one(path, "short", column="caption_short")))
    assert list(found) == ["long-raw", "long", "short"]
    assert found["short"].gained_over == found["long"].gained_over == "long-raw"


def test_a_name_that_raw_captions_need_is_not_given_away(tmp_path):
    other = table(tmp_path / "other.parquet", caption=["a dog"])
    with pytest.raises(ConfigError, match="'dense-raw' is what the raw captions of 'dense' are called; give the other"):
        find_sets(job(tmp_path, one(run_of_captions(tmp_path), "dense"), one(other, "dense-raw")))


def test_sets_are_compared_as_the_job_says(tmp_path):
    first = table(tmp_path / "one.parquet", caption=["a dog"])
    second = table(tmp_path / "two.parquet", caption=["a dog and a cat"])
    made = job(tmp_path, one(first, "first"), one(second, "second"), compare={"second": "first"}, threshold=0)
    found = do(made)
    assert found["second"].gained == [("cat", 1, 0)]
    with pytest.raises(ConfigError, match="compare: expected names of sets, .* found 'frist'; did you mean 'first'?"):
        find_sets(job(tmp_path, one(first, "first"), compare={"frist": "first"}))
    # The table is one that was compared with nothing: the report is written anew, nothing is counted again.
    before = commits(made)
    assert do(made.model_copy(update={"compare": {}}))["second"].gained == []
    assert commits(made) == before


def test_a_report_of_other_captions_is_not_replaced_in_silence(tmp_path, caplog):
    first = table(tmp_path / "one.parquet", caption=["a dog"])
    caplog.set_level("INFO")
    do(job(tmp_path, one(first, "first")))
    [(run, plan)] = stats.plan(job(tmp_path, one(first, "first"), threshold=5))
    stats.tell_what_is_replaced(run, plan)
    assert "which this one replaces" not in caplog.text
    [(run, plan)] = stats.plan(job(tmp_path, one(first, "second")))
    stats.tell_what_is_replaced(run, plan)
    assert "holds a report of other captions or of other names, which this one replaces" in caplog.text


def commits(made):
    return {path: path.stat().st_mtime_ns for path in (Path(made.output) / COMMITS).iterdir()}


@pytest.mark.parametrize(
    ("captions", "what"),
    [
        ([None, None], "found rows without one: 2 null or blank .no_caption 2.; name what has some"),
        (["", " \n"], "found rows without one: 2 null or blank .no_caption 2.; name what has some"),
    ],
)
def test_a_set_without_any_caption_is_an_error_that_says_what_there_was(tmp_path, captions, what):
    path = table(tmp_path / "captions.parquet", caption=pa.array(captions, pa.string()))
    with pytest.raises(DataError, match=f"one: expected captions in column 'caption' of .*, {what}"):
        do(job(tmp_path, one(path)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_set_without_any_row_is_found_before_anything_is_counted(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    table(path, caption=pa.array([], pa.string())) if name.endswith("parquet") else path.write_text("")
    with pytest.raises(DataError, match=rf"one: expected captions in .*{name}, found no rows; name what has some"):
        stats.plan(job(tmp_path, one(path)))
    other = table(tmp_path / "in/b.parquet", caption=DENSE) if name != "a.txt" else None
    if other is not None:  # one file of several may be empty
        stats.plan(job(tmp_path, one(tmp_path / "in")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": "/no/such/folder"}, "tokenizer: "),
        ({"gallery": {"source": {"paths": ["/no/such/pictures"]}}}, r"gallery\.source\.paths: "),
        ({"compare": {"two": "one"}}, "compare: expected names of sets"),
        ({"compare": {"one": "one"}}, "compare: expected two sets, found 'one' and itself"),
    ],
)
def test_mistakes_are_found_by_a_dry_run(tmp_path, given, message):
    path = table(tmp_path / "captions.parquet", caption=DENSE)
    with pytest.raises(ConfigError, match=message):
        stats.plan(job(tmp_path, one(path), **given))


def test_a_column_of_numbers_in_jsonl_that_shows_late_is_an_error_in_the_end(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"caption": null}\n' + '{"caption": 5}\n' * 3)
    with pytest.raises(
        DataError, match="without one: 3 damaged .column caption holds int, not text., 1 null or blank .no_caption 1.;"
    ):
        do(job(tmp_path, one(path)))


FOREIGN = {
    "de": [
        "Ein brauner Hund liegt auf einem roten Sofa neben dem Fenster.",
        "Zwei Kinder spielen im Park mit dem Ball, und eine Frau sieht ihnen zu.",
        "Ein alter Zug wartet an einem kleinen Bahnhof unter einem bewölkten Himmel.",
    ],
    "fr": [
        "Un chien brun est couché sur un canapé rouge à côté de la fenêtre.",
        "Deux enfants jouent au ballon dans le parc pendant qu'une femme les regarde.",
        "Un vieux train attend dans une petite gare sous un ciel nuageux.",
    ],
    "zh": [
        "一只棕色的狗躺在窗边的红色沙发上。",
        "两个孩子在公园里玩球，一位女士在旁边看着。",
        "一列旧火车停在小站里。",
    ],
}


@pytest.mark.parametrize("code", FOREIGN)
def test_another_language_is_flagged(tmp_path, code):
    foreign = table(tmp_path / "foreign.parquet", caption=FOREIGN[code] * 4)
    english = table(tmp_path / "en.parquet", caption=DENSE)
    found = do(job(tmp_path, one(foreign, "foreign"), one(english, "english")))
    assert found["foreign"].language == {
        "num_captions": 12,
        "share_other": 1.0,
        "flagged": True,
        "most": [[code, 12]],
    }
    assert not found["english"].language["flagged"]


@pytest.mark.parametrize("num_german", [300, 900, 1800])
@pytest.mark.parametrize("mixed", ["by file", "at random", "at the end"])
def test_of_mixed_corpora_the_share_of_each_language_is_found(mixed, num_german):
    english, german = pa.array(DENSE * 300), pa.array(FOREIGN["de"] * (num_german // 3))
    units = [pa.concat_arrays([english, german])]
    if mixed == "by file":
        units = [english, german]
    elif mixed == "at random":
        units = [units[0].take(pa.array(np.random.default_rng(1).permutation(len(units[0]))))]
    language = Facts.merged(map(spoken, units)).language
    true = num_german / (1200 + num_german)
    assert language["share_other"] == pytest.approx(true, abs=0.11)
    assert language["flagged"] == (true > 0.5)


def spoken(captions):
    """Return what is known of a unit with these captions."""
    sample = LanguageSample("a")
    for first in range(0, len(captions), 256):
        sample.add(captions[first : first + 256], first)
    facts = Facts(languages=sample.languages())
    facts.totals.num_captions = len(captions)
    assert 80 <= facts.languages.total() <= 200
    return facts


def test_lengths_are_measured_with_the_tokenizer(tmp_path, miniatures):
    path = table(tmp_path / "captions.parquet", caption=[*DENSE, None])
    made = job(tmp_path, one(path), tokenizer=miniatures["t5"], max_tokens=9)
    lengths = do(made)["one"].lengths
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(miniatures["t5"])
    expected = [len(tokenizer(caption)["input_ids"]) for caption in DENSE]
    assert lengths["num_captions"] == 4
    assert lengths["mean_tokens"] == pytest.approx(sum(expected) / 4)
    assert lengths["share_truncated"] == sum(length > 9 for length in expected) / 4
    with pytest.raises(ConfigError, match="tokenizer: "):
        do(job(tmp_path, one(path), tokenizer=str(tmp_path / "none")))


def test_a_small_set_is_measured_whole_beside_a_large_one(tmp_path, miniatures, monkeypatch):
    small = table(tmp_path / "small.parquet", caption=DENSE * 4)
    large = table(tmp_path / "large.parquet", caption=DENSE * 50)
    monkeypatch.setattr("pixart_data.lengths.shares.level_of", lambda num_rows, most_rows: int(num_rows > 100))
    found = do(job(tmp_path, one(large, "large"), one(small, "small"), tokenizer=miniatures["t5"]))
    assert [found[name].lengths["share_of_rows"] for name in ("small", "large")] == [1.0, 0.5]
    assert found["small"].lengths["num_captions"] == 16
    assert 50 < found["large"].lengths["num_captions"] < 150


def test_the_gallery_shows_pictures_with_both_captions(tmp_path, pictures, page):
    keys = [f"pictures/{path.stem}" for path in sorted(pictures.glob("*.jpg"))][:3]
    path = table(
        tmp_path / "captions.parquet", key=keys, caption=DENSE[:3], raw_caption=["a dog", None, "a train & a station"]
    )
    made = job(tmp_path, one(path), gallery={"source": {"paths": [str(pictures)]}, "num_pictures": 5})
    do(made)
    source = (tmp_path / "report/report.html").read_text()
    assert source.count("data:image/jpeg") == 2
    assert "a train &amp; a station" in source
    assert parts(made)["one--captions", "drawn"].num_rows == 2
    before = commits(made)
    other = job(tmp_path, one(path), gallery={"source": {"paths": [str(pictures)]}, "num_pictures": 1, "seed": 3})
    do(other)
    assert (tmp_path / "report/report.html").read_text().count("data:image/jpeg") == 1
    assert commits(made) == before  # another gallery counts nothing again


def test_a_gallery_without_captions_beside_each_other_says_so(tmp_path, pictures, caplog):
    path = table(tmp_path / "captions.parquet", caption=DENSE)
    do(job(tmp_path, one(path), gallery={"source": {"paths": [str(pictures)]}}))
    assert "gallery: expected a table with captions and raw captions beside each other, found none" in caplog.text
    assert "gallery: expected rows" not in caplog.text


def test_a_gallery_without_a_row_that_has_both_captions_says_so(tmp_path, pictures, caplog):
    path = table(tmp_path / "captions.parquet", caption=DENSE, raw_caption=[" "] * 4)
    do(job(tmp_path, one(path), gallery={"source": {"paths": [str(pictures)]}}))
    assert "gallery: expected rows with a caption and a raw caption, found none" in caplog.text


# Exactly once


def test_a_finished_job_does_nothing_and_a_report_that_is_gone_is_written_again(tmp_path):
    made = job(tmp_path, one(table(tmp_path / "captions.parquet", caption=DENSE)))
    found = do(made)
    files = {path: path.stat().st_mtime_ns for path in Path(made.output).rglob("*") if path.is_file()}
    assert do(made) == found
    assert {path: path.stat().st_mtime_ns for path in files} == files
    page = (tmp_path / "report/report.html").read_bytes()
    (tmp_path / "report/report.html").unlink()
    do(made)
    assert (tmp_path / "report/report.html").read_bytes() == page
    assert commits(made).items() <= files.items()


def test_the_report_is_written_anew_where_other_lemmas_are_found(tmp_path, monkeypatch):
    made = job(tmp_path, one(table(tmp_path / "captions.parquet", caption=DENSE)))
    do(made)
    before = commits(made)
    rule = "lemmas of a WordNet installed since"
    lemmas = Lemmatizer(rule, plurals_only=False, lemma=lambda noun: noun[:1])
    for module_name in ("pipelines.findings", "pixart_data.nouns"):
        monkeypatch.setattr(f"{module_name}.find_lemmatizer", lambda: lemmas)
    assert do(made)["one"].views["lemma"].rule == rule
    assert commits(made) == before


def test_a_report_is_sealed_and_damage_to_it_found(tmp_path):
    made = job(tmp_path, one(table(tmp_path / "captions.parquet", caption=DENSE)))
    do(made)
    root = tmp_path / "report"
    (root / "job.toml").write_text("# pixart stats\n")
    findings = list(verify(root))
    assert [finding.problem for finding in findings] == [""] * len(findings)
    seen = {finding.path.relative_to(root).parts[0] for finding in findings}
    assert seen == {"stats.json", "report.html", "figures", "counts", "measures"}
    damaged = next(iter((root / "figures").iterdir()))
    damaged.write_bytes(b"no picture")
    [finding] = [finding for finding in verify(root) if finding.problem]
    assert finding.path == damaged
    assert "run `pixart stats`" in finding.problem


def test_another_column_redoes_its_set_alone(tmp_path):
    first = table(tmp_path / "one.parquet", caption=["a red house"])
    second = table(tmp_path / "two.parquet", caption=["a dog"], other=["a cat"])
    do(job(tmp_path, one(first, "one"), one(second, "two")))
    again = job(tmp_path, one(first, "one"), one(second, "two", column="other"))
    run = stats.prepare(again, find_sets(again), download=False)
    line = make_plan(run).line(run)
    assert line.startswith("stats: 2 shards, 1 done, 1 to do (0 new; 1 redone: column changed)")
    assert do(again)["two"].top == [("cat", 1)]


def test_a_unit_that_fails_leaves_nothing_for_the_next(tmp_path):
    good = table(tmp_path / "a/good.parquet", caption=DENSE)
    bad = Path(table(tmp_path / "a/bad.parquet", caption=[f"a dog and a cat {i}" for i in range(30_000)]))
    made = job(tmp_path, one(tmp_path / "a"))
    sets = find_sets(made)
    stage = stats.prepare(made, sets, download=False).build()
    data = bytearray(bad.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    bad.write_bytes(data)
    units = {Path(unit.file.path).stem: unit for unit in sets.units}
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as Parquet"):
        stage(units["bad"], lambda rows, rejected: None)
    record = stage(units["good"], lambda rows, rejected: None)
    [counts] = [file for file in record.files if file.path.startswith("counts/")]
    alone = job(tmp_path, one(good, "alone"), output=str(tmp_path / "alone"))
    do(alone)
    assert pq.read_table(tmp_path / "report" / counts.path).equals(parts(alone)["alone--good", "counts"])
    assert [path.name for path in (tmp_path / "report/measures").iterdir()] == [Path(record.files[1].path).name]


KILLED = """
import os, signal, sys
from tests.pipelines.test_stats import do
from pipelines import stats
from pipelines.config import Stats
from pixart_data import columns
from pixart_data.config import load
from pathlib import Path

columns._ROWS_PER_READ = 4
made = load(Stats, Path(sys.argv[1]))
count = stats.StatsStage._measure

def killing(stage, rows):
    if "second" in (rows.keys[0].as_py() or "") and rows.first:
        os.kill(os.getpid(), signal.SIGKILL)  # between two batches of the second file
    return count(stage, rows)

stats.StatsStage._measure = killing
do(made)
"""


def test_a_kill_loses_the_unit_in_flight_and_doubles_nothing(tmp_path, job_file):
    for name in ("first", "second", "third"):
        table(tmp_path / "in" / f"{name}.parquet", caption=[f"{name} dog {i % 7}" for i in range(20)])
    made = job(tmp_path, one(tmp_path / "in"))
    path = job_file("stats", made.model_dump(exclude_none=True))
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], cwd=root, check=False, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert killed.returncode == -signal.SIGKILL
    output = Path(made.output)
    before = commits(made)
    assert [path.stem for path in before] == ["one--first"]
    assert list((output / "measures").glob(".tmp-*"))  # what was being written
    sweep(output, [output / "counts", output / "measures"], read_records(output).values())
    found = do(made)
    assert before.items() <= commits(made).items()
    assert found == do(job(tmp_path, one(tmp_path / "in"), output=str(tmp_path / "quiet")))
    files = {file.path for record in read_records(output).values() for file in record.files}
    assert {p.relative_to(output).as_posix() for p in output.glob("*/*.parquet")} == files


def test_a_machine_with_another_tagger_is_refused(tmp_path):
    made = job(tmp_path, one(table(tmp_path / "captions.parquet", caption=DENSE)))
    with pytest.raises(ConfigError, match="expected nltk 1.0, as where the job was planned, found textblob"):
        stats.StatsStage(made, "textblob", "nltk 1.0", {})


def test_facts_add_up_and_come_back(tmp_path):
    do(job(tmp_path, one(run_of_captions(tmp_path))))
    records = read_records(tmp_path / "report").values()
    facts = [Facts.from_json(json.loads(json.dumps(record.facts))) for record in records]
    assert [fact.to_json() for fact in facts] == [record.facts for record in records]
    both = Facts.merged(facts)
    assert both.totals.num_captions == 4 + 3
    assert both.frames.to_json()["num_images"] == 4
    with pytest.raises(DataError, match="expected what `pixart stats` noted of a unit, found damage"):
        Facts.from_json({"totals": Totals().to_json()})


def test_the_record_accounts_for_what_the_unit_read():
    with pytest.raises(DataError, match="unaccounted"):
        Record("u", "", {}, 3, 1, {"no_caption": 1}, [])
