"""The caption gate: what fails is asked for again with other decoding, within a limit; what still fails is marked."""

import json
import re
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.cli import main, parser, read_job
from pipelines import caption, driver, pictures
from pipelines.caption import CaptionStage
from pipelines.config import Caption, Gating
from pipelines.gate import Gatekeeper, lacks
from pipelines.pictures import read_pictures
from pixart_data import chats, gates
from pixart_data.captions import caption_files, read_captions
from pixart_data.commits import Record, read_records
from pixart_data.config import digest, load, resolved_toml
from pixart_data.errors import ConfigError
from pixart_data.questions import Caption as Answer
from pixart_data.questions import NoCaption
from pixart_data.records import CAPTIONS, Reason
from pixart_data.sections import Captioner
from pixart_data.sources import find_units
from pixart_data.storage import location
from pixart_data.verdicts import Verdicts
from tests.chats import ChatServer, completion, status

MODEL = "org/model"
GOOD = (
    "The image shows a small farm house beside a green field with two old trees and a wooden fence. "
    "A narrow path leads from the house to a quiet lake under a blue sky with a few white clouds."
)
LOOP = "The house is red and the house is red and the house is red and the house is red and the house is red. " * 2
CUT = GOOD.removesuffix(" a few white clouds.")


def judge(text):
    """The verdict of a gate that a text speaks itself: `loop truncated | words`."""
    return text.partition("|")[0].split() if "|" in text else []


class SpokenGate:
    """In place of the real gate, for rows whose verdicts a test lays down."""

    tagger = "spoken 1"

    def __init__(self, gate, kind):
        self.kind, self.prompts = kind, []

    def judge(self, captions, prompts, finish_reasons):
        assert len(captions) == len(prompts) == len(finish_reasons)
        self.prompts += prompts
        return [judge(text) for text in captions]


@pytest.fixture
def keeper(monkeypatch):
    monkeypatch.setattr(gates, "CaptionGate", SpokenGate)

    def make(tagger=None, **settings):
        return Gatekeeper(Gating(**settings), Captioner(max_new_tokens=100), tagger)

    return make


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(chats, "_FIRST_PAUSE_S", 0.01)
    with ChatServer() as running:
        yield running


@pytest.fixture
def folder(pictures, tmp_path):
    """The demo's pictures and one that is broken."""
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    (copy / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return copy


def make_job(folder, output, gate=None, **captioner):
    section = {"model": MODEL, "max_new_tokens": 60, **captioner}
    given = {"output": str(output), "source": {"paths": [str(folder)], "rows_per_unit": 5}, "captioner": section}
    given |= {"cluster": {"num_workers": 1, "cpus_per_worker": 0.1}}
    return load(Caption, None, [], {**given, **({} if gate is None else {"gate": {"approximate": True, **gate}})})


def served(server):
    return {"urls": [server.url], "patience_s": 0.0, "max_attempts": 2, "concurrency": 4}


def row_of(text, **more):
    return {"key": "a/b", "caption": text, "prompt": "What?", "finish_reason": "stop", **more}


def rows_at(root):
    return [row for file in caption_files(root, "path") for row in pq.read_table(file.path).to_pylist()]


def nothing(rows, rejected):
    """Report to nobody."""


# One row


def test_what_is_done_about_a_row_stands_in_the_row(keeper):
    gate = keeper(attempts=2)
    row = row_of("loop too_short | the the")
    rejected = row_of(None)
    gate.judge([row, rejected])
    assert row["gate"] == row["gate_first"] == ["loop", "too_short"]
    assert row["num_attempts"] == row["kept_attempt"] == 1
    assert "gate" not in rejected
    assert (gate.is_due(row), gate.is_due(rejected)) == (True, False)
    gate.weigh([row], [Answer("loop truncated echo | worse", "What?", "length", 9, 8)])
    assert (row["caption"], row["num_attempts"], row["kept_attempt"]) == ("loop too_short | the the", 2, 1)
    gate.weigh([row], [Answer("echo | better", "What?", "length", 9, 8)])
    kept = {"caption": "echo | better", "finish_reason": "length", "num_tokens": 8, "gate": ["echo"], "num_attempts": 3}
    kept["kept_attempt"] = 3
    assert {name: row[name] for name in kept} == kept
    assert row["gate_first"] == ["loop", "too_short"]
    assert not gate.is_due(row)  # it has no attempts left
    before = {"unanswered": {"refused": 2, "server_error": 7}}
    assert gate.facts([row, rejected], {"refused": 1, "empty_caption": 1}, before)["gate"] == {
        "settings": Gating(attempts=2).model_dump(),
        "tagger": "spoken 1",
        "num_judged": 1,
        "num_failed": 1,
        "num_mended": 0,
        "num_asked": 2,
        "first": {"loop": 1, "too_short": 1},
        "left": {"echo": 1},
        "unanswered": {"empty_caption": 1, "refused": 3},
        "approximate": False,
    }


def test_the_first_answer_stays_where_another_is_no_better(keeper):
    gate = keeper()
    row = row_of("loop | first")
    gate.judge([row])
    gate.weigh([row], [Answer("echo | as bad", "What?", "stop", 9, 8)])
    assert (row["caption"], row["gate"]) == ("loop | first", ["loop"])


@pytest.mark.parametrize("answer", [NoCaption("What?", Reason.REFUSED, "no"), Answer("", "What?", "stop", 9, 0)])
def test_no_answer_is_an_attempt_and_changes_nothing_else(keeper, answer):
    gate = keeper(attempts=1)
    row = row_of("loop | first")
    gate.judge([row])
    assert gate.weigh([row], [answer]) == {"refused" if isinstance(answer, NoCaption) else "empty_caption": 1}
    assert (row["caption"], row["gate"], row["num_attempts"]) == ("loop | first", ["loop"], 2)
    assert not gate.is_due(row)


def test_an_error_of_a_server_is_no_attempt(keeper):
    gate = keeper(attempts=1)
    row = row_of("loop | first")
    gate.judge([row])
    assert gate.weigh([row], [NoCaption("What?", Reason.SERVER_ERROR, "no")]) == {"server_error": 1}
    assert (row["caption"], row["gate"], row["num_attempts"]) == ("loop | first", ["loop"], 1)
    assert gate.is_due(row)


def test_captions_are_judged_by_the_engine_that_the_job_was_planned_with(keeper):
    assert keeper(tagger="spoken 1").tagger == "spoken 1"
    with pytest.raises(ConfigError, match=r"expected spoken 2, .* found spoken 1 on this machine; install one version"):
        keeper(tagger="spoken 2")


def test_the_decoding_fits_the_attempt_and_the_failure(keeper):
    gate = keeper(temperatures=[0.4, 0.8], top_p=0.7, frequency_penalty=0.25, more_tokens=1.5, attempts=3)

    def decoding(num_attempts, *failures):
        how = gate.decoding({"gate": list(failures), "num_attempts": num_attempts})
        return how.temperature, how.max_new_tokens, how.frequency_penalty, how.top_p

    assert decoding(1, "refusal") == (0.4, 100, 0.0, 0.7)
    assert decoding(2, "rambling") == (0.8, 100, 0.0, 0.7)  # a penalty would make it ramble more
    assert decoding(3, "loop") == (0.8, 100, 0.25, 0.7)  # the last temperature serves for all further attempts
    assert decoding(1, "loop", "truncated") == (0.4, 150, 0.25, 0.7)


def test_other_limits_judge_anew_and_ask_what_is_left(keeper):
    row = row_of("loop | words", gate=[], gate_first=[], num_attempts=1)
    gate = keeper(attempts=1)
    gate.judge([row])  # with the limits of before it passed
    assert (row["gate"], row["gate_first"], gate.is_due(row)) == (["loop"], ["loop"], True)
    asked = row_of("loop | words", gate=["loop"], gate_first=["echo"], num_attempts=2, kept_attempt=2)
    gate.judge([asked])
    assert (asked["gate_first"], gate.is_due(asked)) == (["echo"], False)
    more = keeper(attempts=2)
    more.judge([asked])
    assert more.is_due(asked)


def test_a_caption_that_other_limits_let_pass_was_not_mended(keeper):
    row = row_of("fine by now", gate=["echo"], gate_first=["echo", "loop"], num_attempts=3, kept_attempt=1)
    keeper().judge([row])
    assert (row["gate"], row["gate_first"], row["num_attempts"]) == ([], [], 3)
    assert Verdicts.of([row]).line() == "gate: all of 1 passed"
    mended = row_of("fine", gate=[], gate_first=["echo"], num_attempts=3, kept_attempt=2)
    keeper().judge([mended])
    assert Verdicts.of([row, mended]).line() == (
        "gate: 1 of 2 failed (echo 1), 1 passed when asked again, 0 still failing"
    )


def record_of(gate, tagger="spoken 1", left=(), **facts):
    settings = {"settings": gate.model_dump(), "tagger": tagger}
    return Record("u", "", {}, 1, 1, {}, [], facts={"gate": {**settings, "left": dict.fromkeys(left, 1), **facts}})


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (Record("u", "", {}, 1, 1, {}, []), "captions not judged"),
        (record_of(Gating()), ""),
        (record_of(Gating(), left=["loop"]), ""),
        (record_of(Gating(min_nouns=5)), "gate.min_nouns changed"),
        (record_of(Gating(), tagger="spoken 0"), "gate.tagger changed"),
        (record_of(Gating(attempts=9, temperatures=[0.1], top_p=0.5, more_tokens=3.0, frequency_penalty=0.1)), ""),
        (record_of(Gating(attempts=9), left=["loop"]), "gate.attempts changed"),
        (record_of(Gating(), left=["loop"], unanswered={"refused": 1}), ""),
        (record_of(Gating(), left=["loop"], unanswered={"server_error": 1}), "captions that a server failed on"),
    ],
)
def test_what_is_judged_anew_is_what_would_be_judged_or_asked_otherwise(record, why):
    assert lacks(Gating(), "spoken 1", True, record) == why
    assert lacks(None, None, True, record) == ""
    assert lacks(Gating(), "spoken 1", False, record) == ("" if "server" in why else why)  # as `pixart retry` has it


def test_the_account_says_what_became_of_the_captions():
    rows = [
        {"gate": [], "gate_first": [], "num_attempts": 1, "kept_attempt": 1},
        {"gate": [], "gate_first": ["loop"], "num_attempts": 2, "kept_attempt": 2},
        {"gate": ["loop", "truncated"], "gate_first": ["loop", "truncated"], "num_attempts": 3, "kept_attempt": 1},
        {"gate": None, "gate_first": None, "num_attempts": None},
        {},
    ]
    one = Verdicts.of(rows)
    assert Verdicts.from_facts(json.loads(json.dumps(one.to_facts()))) == one
    both = Verdicts.of(rows[:2]).plus(Verdicts.of(rows[2:]))
    assert both == one
    assert one.line() == (
        "gate: 2 of 3 failed (loop 2, truncated 1), 1 passed when asked again, 1 still failing (loop 1, truncated 1)"
    )
    assert Verdicts.of(rows[:1]).line() == "gate: all of 1 passed"
    assert Verdicts().line() == ""
    marked = Verdicts(num_judged=5, num_failed=2, first={"echo": 2}, left={"echo": 2})
    assert marked.line() == "gate: 2 of 5 failed (echo 2), 2 still failing (echo 2)"
    vain = replace(marked, unanswered={"refused": 1, "server_error": 2}, approximate=True).plus(marked)
    assert vain.line() == (
        "gate: 4 of 10 failed (echo 4), 4 still failing (echo 4); asked without an answer (server_error 2, refused 1); "
        "approximate, by TextBlob's lexicon"
    )
    assert replace(one, num_failed=0, approximate=True).line() == (
        "gate: all of 3 passed; approximate, by TextBlob's lexicon"
    )


# A unit


def fickle(handler, request):
    """Loop when asked for the first time; then say something good, but of wide pictures break off, and of one loop."""
    body, num_tokens = request.body, 90 + len(request.prompt.encode())
    width, height = request.image.size
    if body["temperature"] == 0:
        handler.say(200, completion(LOOP, num_tokens, 60, "length"))
    elif (width, height) == fickle.stubborn:
        handler.say(200, completion(LOOP, num_tokens, 55))
    elif body["temperature"] < 0.7 and width > height:
        handler.say(200, completion(CUT, num_tokens, 40, "length"))
    else:
        handler.say(200, completion(GOOD, num_tokens, 44))


def test_a_caption_that_loops_is_asked_for_again_until_it_passes(folder, server, tmp_path):
    Image.new("RGB", (70, 90), "red").save(folder / "stubborn.png")
    fickle.stubborn = (70, 90)
    server.usual = fickle
    units = find_units(make_job(folder, tmp_path).source)
    stage = CaptionStage(make_job(folder, tmp_path / "out", {}, server=served(server)))
    try:
        records = [stage(unit, nothing) for unit in units]
    finally:
        stage.captioner.close()
    rows = {}
    for record in records:
        for row in pq.read_table(tmp_path / "out" / record.files[0].path).to_pylist():
            rows[row["key"].partition("/")[2]] = row
    assert len(rows) == 14
    broken = rows.pop("broken")
    assert (broken["error"], broken["gate"], broken["num_attempts"]) == ("truncated_image", None, None)
    for name, row in rows.items():
        stubborn = name == "stubborn"
        assert row["status"] == "ok"
        assert "loop" in row["gate_first"]
        assert row["num_attempts"] == (3 if stubborn or row["width_px"] > row["height_px"] else 2)
        assert (row["caption"] == GOOD) == (row["gate"] == []) == (not stubborn)
        if not stubborn:
            assert (row["finish_reason"], row["num_tokens"]) == ("stop", 44)
    assert len(server.of_rows) == sum(row["num_attempts"] for row in rows.values())
    again = [request.body for request in server.of_rows if request.body["temperature"] > 0]
    assert len({body["seed"] for body in again}) == len(again)
    assert {body["temperature"] for body in again} == {0.5, 0.9}
    assert {body["frequency_penalty"] for body in again if body["temperature"] == 0.5} == {0.3}
    assert {body["max_tokens"] for body in again} >= {90}  # the loops were cut off, too
    verdicts = Verdicts.in_records(records)
    assert (verdicts.num_judged, verdicts.num_failed, verdicts.num_mended) == (13, 13, 12)
    assert verdicts.first["loop"] == 13
    assert verdicts.left["loop"] == 1


def test_a_server_that_fails_when_asked_again_costs_an_attempt_and_no_row(folder, server, tmp_path):
    def fails_again(handler, request):
        if request.body["temperature"] == 0:
            handler.say(200, completion(LOOP, 200, 60))
        else:
            status(400, "no sampling here")(handler, request)

    server.usual = fails_again
    stage = CaptionStage(make_job(folder, tmp_path / "out", {"attempts": 1}, server=served(server)))
    record = stage(find_units(stage.job.source)[-1], nothing)
    stage.captioner.close()
    assert record.rows_out == record.facts["gate"]["num_failed"] == record.facts["gate"]["num_asked"] > 0
    assert record.facts["gate"]["unanswered"] == {"refused": record.rows_out}
    for row in pq.read_table(tmp_path / "out" / record.files[0].path).to_pylist():
        assert (row["status"], row["error"], row["caption"]) == ("ok", None, LOOP.strip())


def test_what_a_server_failed_on_is_left_to_another_run(folder, server, tmp_path):
    def is_ill(handler, request):
        if request.body["temperature"] == 0:
            handler.say(200, completion(LOOP, 200, 60))
        else:
            status(500, "out of order")(handler, request)

    server.usual = is_ill
    job = make_job(folder, tmp_path / "out", {}, server=served(server))
    stage = CaptionStage(job)
    unit = find_units(stage.job.source)[-1]
    first = stage(unit, nothing)
    assert first.facts["gate"]["unanswered"] == {"server_error": first.rows_out}
    assert "asked without an answer (server_error" in Verdicts.in_records([first]).line()
    asked = [request for request in server.of_rows if request.body["temperature"] > 0]
    assert len(asked) == stage.captioner.server.max_attempts * first.rows_out  # and no more than that
    assert {row["num_attempts"] for row in rows_at_record(stage.root, first)} == {1}
    assert lacks(job.gate, stage.gate.tagger, True, first) == "captions that a server failed on"

    fickle.stubborn = None
    server.usual = fickle
    second = stage.amend(unit, first, nothing)
    stage.captioner.close()
    assert second.facts["gate"]["num_mended"] == second.rows_out == first.rows_out
    assert second.facts["gate"]["unanswered"] == {}
    assert lacks(job.gate, stage.gate.tagger, True, second) == ""


def rows_at_record(root, record):
    return pq.read_table(root / record.files[0].path).to_pylist()


def test_rows_that_are_retried_go_through_the_gate_and_the_others_stay(folder, server, tmp_path):
    fickle.stubborn = None
    server.usual = fickle
    job = make_job(folder, tmp_path / "out", {"temperatures": [0.9]}, server=served(server))
    stage = CaptionStage(job)
    unit = find_units(job.source)[-1]
    server.plan.append(status(400, "not now"))
    before = stage(unit, nothing)
    assert before.rejected["refused"] == 1
    server.requests.clear()
    after = stage.retry(unit, ("refused",), before, nothing)
    stage.captioner.close()
    assert "refused" not in after.rejected
    assert len(server.of_rows) == 2  # a loop, and what is better
    rows = pq.read_table(tmp_path / "out" / after.files[0].path).to_pylist()
    assert {(row["caption"], row["num_attempts"]) for row in rows if row["status"] == "ok"} == {(GOOD, 2)}
    assert after.facts["gate"]["num_mended"] == before.facts["gate"]["num_mended"] + 1


@pytest.fixture
def miniature(folder, miniatures, tmp_path):
    """Make stages around one loaded miniature; its captions are random words, which fail any gate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {}

    def make(name, gate, batch_size=4):
        job = make_job(folder, tmp_path / name, gate, model=miniatures["llava"], max_new_tokens=24)
        if "stage" not in made:
            made["stage"] = CaptionStage(job)
        stage = made["stage"]
        stage.job, stage.root = job, tmp_path / name
        stage.captioner.batch_size = batch_size
        stage.gate = None if job.gate is None else Gatekeeper(job.gate, job.captioner)
        return stage

    yield make
    torch.set_num_threads(threads)


STRICT = {"min_nouns": 12, "max_repeated": 0.05, "temperatures": [1.5, 0.7]}


def test_captions_are_the_same_whether_they_are_judged_at_once_or_later(miniature, tmp_path):
    """And whatever the batch, and in however many passes; nothing is asked twice."""
    stage = miniature("at-once", STRICT)
    [unit, *_] = find_units(stage.job.source)
    whole = stage(unit, nothing)
    facts = whole.facts["gate"]
    assert facts["num_failed"] > 0
    assert facts["num_asked"] >= facts["num_failed"]

    plain = miniature("later", None)(unit, nothing)
    assert "gate" not in plain.facts
    rows = pq.read_table(tmp_path / "later" / plain.files[0].path).to_pylist()
    assert {(row["gate"], row["num_attempts"]) for row in rows} == {(None, None)}
    captions = pq.read_table(tmp_path / "at-once" / whole.files[0].path)["caption"].to_pylist()
    assert any(one != row["caption"] for one, row in zip(captions, rows, strict=True))  # a drawn one was better
    first = miniature("later", {**STRICT, "attempts": 1}, batch_size=3).amend(unit, plain, nothing)
    both = miniature("later", STRICT, batch_size=2).amend(unit, first, nothing)
    assert both.files[0].sha256 == whole.files[0].sha256
    assert both.facts == whole.facts
    assert first.facts["gate"]["num_asked"] < facts["num_asked"]

    asked = []
    stage = miniature("later", STRICT)
    stage.describe, describe = lambda batch: asked.append(batch) or describe(batch), stage.describe
    same = stage.amend(unit, both, nothing)
    assert asked == []
    assert same.files[0].sha256 == whole.files[0].sha256


def test_a_table_without_the_columns_can_be_judged_and_read(miniature, folder, tmp_path):
    stage = miniature("old", None)
    [unit, *_] = find_units(stage.job.source)
    record = stage(unit, nothing)
    path = tmp_path / "old" / record.files[0].path
    before = pq.read_table(path).select(CAPTIONS.names[:-4])  # as it was written before there was a gate
    pq.write_table(before, path)
    found = list(read_captions(caption_files(path, "path")[0], "caption", need_key=True))
    assert [row.caption for row in found if row.error is None] == before["caption"].drop_null().to_pylist()
    amended = miniature("old", {"attempts": 0}).amend(unit, record, nothing)
    after = pq.read_table(tmp_path / "old" / amended.files[0].path)
    assert after.select(before.column_names) == before.cast(pa.schema(list(after.schema)[:-4]))
    assert after.schema.metadata[b"gate"].startswith(b"textblob ")  # a file that is passed on says by what
    assert after.schema.metadata[b"gate"].decode() == amended.facts["gate"]["tagger"]
    assert amended.facts["gate"]["approximate"]
    assert amended.facts["gate"]["num_asked"] == 0
    assert amended.facts["gate"]["num_failed"] > 0


def test_an_image_that_is_gone_keeps_the_caption_that_it_has(miniature, folder):
    stage = miniature("gone", None)
    [unit, *_] = find_units(stage.job.source)
    record = stage(unit, nothing)
    rows = pq.read_table(stage.root / record.files[0].path).to_pylist()
    kept = next(row for row in rows if row["status"] == "ok")
    for path in folder.glob(f"{kept['key'].partition('/')[2]}.*g"):
        path.write_bytes(b"")
    amended = miniature("gone", STRICT).amend(unit, record, nothing)
    after = {row["key"]: row for row in pq.read_table(stage.root / amended.files[0].path).to_pylist()}
    assert after[kept["key"]]["caption"] == kept["caption"]
    assert after[kept["key"]]["gate"]
    assert after[kept["key"]]["num_attempts"] == 1


def test_what_captions_are_judged_with_is_asked_for_before_any_work(folder, tmp_path, monkeypatch):
    import nltk.data

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ConfigError) as error:
        CaptionStage(make_job(folder, tmp_path / "out", {"approximate": False}, server="http://127.0.0.1:9/v1"))
    lines = str(error.value).splitlines()
    assert "pixart stats --download-nltk" in lines[0]
    assert "or set gate.approximate = true" in lines[0]


def test_without_nltks_data_nothing_is_begun(folder, tmp_path, monkeypatch, capsys, job_file):
    import nltk.data

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nowhere")])
    monkeypatch.setattr(caption, "execute", lambda *_: pytest.fail("it was begun"))
    written = {"output": str(tmp_path / "out"), "source": {"paths": [str(folder)]}, "captioner": {"model": MODEL}}
    written["captioner"]["server"] = "http://127.0.0.1:9/v1"
    path = str(job_file("caption", written))
    for words in (["--retry-failed-gate"], ["--retry-failed-gate", "--dry-run"]):
        assert main(["caption", path, *words]) == 2
        said = capsys.readouterr().err
        assert "gate.approximate = true" in said
        assert "--approximate" not in said
    assert not (tmp_path / "out").exists()


# The command


def test_the_flag_adds_the_section_and_leaves_what_the_file_says(job_file, tmp_path):
    written = {"output": str(tmp_path / "out"), "source": {"paths": [str(tmp_path)]}}

    def gate(section, *words):
        path = job_file("caption", {**written, **section})
        return read_job(parser().parse_args(["caption", str(path), *words])).gate

    assert gate({}) is None
    assert gate({}, "--retry-failed-gate") == Gating()
    assert gate({"gate": {"attempts": 5}}) == Gating(attempts=5)
    assert gate({"gate": {"attempts": 5}}, "--retry-failed-gate", "--set", "gate.top_p=0.5") == Gating(
        attempts=5, top_p=0.5
    )
    for wrong, told in ((-1.0, "-1"), (2.1, "2.1")):
        with pytest.raises(ConfigError, match=f"gate.temperatures: expected temperatures from 0 to 2, found {told}"):
            gate({"gate": {"temperatures": [0.5, wrong]}})


@pytest.mark.parametrize("key", ["temperatures", "more_tokens", "frequency_penalty", "top_p", "max_repeated"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_settings_of_the_gate_are_numbers(job_file, tmp_path, key, value):
    path = job_file("caption", {"output": str(tmp_path / "out"), "source": {"paths": [str(tmp_path)]}})
    given = f"gate.{key}=[{value}]" if key == "temperatures" else f"gate.{key}={value}"
    with pytest.raises(ConfigError, match=rf"gate\.{key}"):
        read_job(parser().parse_args(["caption", str(path), "--set", given]))


@pytest.fixture
def judged(folder, server, tmp_path):
    """A gated table of three units whose second one has a rejected row, as a run leaves it."""
    fickle.stubborn = None
    server.usual = fickle
    root = tmp_path / "out"
    gated = make_job(folder, root, {"temperatures": [0.9], "attempts": 1}, server=served(server))
    run = caption.prepare(gated)
    stage = run.build()
    for unit in run.units:
        settings = run.settings(unit)
        server.plan += [status(400, "not now")] * (unit is run.units[1])
        record = replace(stage(unit, nothing), settings=settings, digest=digest(settings))
        driver.write_record(root, record, replaces=False)
    stage.captioner.close()
    (root / "job.toml").write_text(f"# pixart caption\n{resolved_toml(gated)}")
    return gated


def begun(monkeypatch, job, reasons=()):
    """The run and the job that would be done, and written down."""
    seen = []
    monkeypatch.setattr(caption, "execute", lambda run, job, finish, reasons: seen.append((run, job)))
    caption.run(job, reasons)
    [(run, written)] = seen
    return run, written


def test_a_table_that_was_judged_stays_judged_without_the_flag(judged, folder, server, monkeypatch):
    """New units go through its gate, and so do rows that `pixart retry` wins."""
    plain = judged.model_copy(update={"gate": None})
    Image.new("RGB", (70, 90), "red").save(folder / "zzz.png")
    run, written = begun(monkeypatch, plain)
    assert written == judged
    [(_, plan)] = caption.plan(plain)
    new = plan.todo[-1][0]
    stage = run.build()
    assert stage(new, nothing).facts["gate"]["num_mended"] > 0
    second = read_records(run.root)[run.units[1].id]
    retried = stage.retry(run.units[1], ("refused",), second, nothing)
    stage.captioner.close()
    assert retried.rejected == {}
    assert retried.facts["gate"]["num_judged"] == second.facts["gate"]["num_judged"] + 1
    assert all(row["gate"] == [] for row in rows_at_record(run.root, retried))


def test_the_gate_is_known_from_the_records_alone(judged, monkeypatch):
    plain, root = judged.model_copy(update={"gate": None}), location(judged.output)
    (root / "job.toml").write_text(f"# pixart caption\n{resolved_toml(plain)}")  # as another version wrote it
    assert begun(monkeypatch, plain)[1] == judged
    (root / "job.toml").unlink()
    assert begun(monkeypatch, plain)[1] == judged
    own = judged.model_copy(update={"gate": Gating(approximate=True)})
    assert begun(monkeypatch, own)[1] == own
    for record in read_records(root).values():
        record.facts["gate"]["settings"]["limit"] = 3
        driver.write_record(root, record)
    with pytest.raises(ConfigError, match=r"other settings of their gate \(limit\); pass --retry-failed-gate"):
        begun(monkeypatch, plain)


def test_a_retry_without_a_gate_keeps_what_the_record_says_of_it(judged, server):
    run = caption.prepare(judged.model_copy(update={"gate": None}))
    stage = run.build()
    second = read_records(run.root)[run.units[1].id]
    retried = stage.retry(run.units[1], ("refused",), second, nothing)
    stage.captioner.close()
    assert retried.facts["gate"] == second.facts["gate"]


def test_only_the_pictures_asked_for_are_read(folder, tmp_path, monkeypatch):
    source = make_job(folder, tmp_path).source
    [unit, *_] = find_units(source)
    keys = [picture.sample.key for picture in read_pictures(unit, source, 4)]
    read_samples, read = pictures.read_samples, []

    def spy(*args, **how):
        for sample in read_samples(*args, **how):
            read.append(sample.key)
            yield sample

    monkeypatch.setattr(pictures, "read_samples", spy)
    found = [picture.sample.key for picture in read_pictures(unit, source, 4, keys={keys[1], keys[3]})]
    assert found == read == [keys[1], keys[3]]


class Killed(BaseException):
    """Stands for the end of the driver's process."""


@pytest.mark.usefixtures("ray_here")
def test_a_finished_table_is_judged_and_mended_and_a_kill_loses_nothing(
    folder, server, tmp_path, monkeypatch, capsys, job_file
):
    Image.new("RGB", (70, 90), "red").save(folder / "stubborn.png")
    fickle.stubborn = (70, 90)
    server.usual = fickle
    root = tmp_path / "out"

    def job(gate):
        return make_job(folder, root, gate, server=served(server))

    def plan(gate):
        [(run, found)] = caption.plan(job(gate))
        return found.line(run).partition(": ")[2].partition(" -> ")[0]

    run = caption.prepare(job(None))
    stage = run.build()
    for unit in run.units:
        settings = run.settings(unit)
        record = replace(stage(unit, nothing), settings=settings, digest=digest(settings))
        driver.write_record(root, record, replaces=False)
    stage.captioner.close()
    assert plan(None) == "3 shards, 3 done, 0 to do"
    assert plan({}) == "3 shards, 0 done, 3 to do (0 new; 3 amended: captions not judged)"
    assert plan({"attempts": 9}) == plan({})

    write, written = driver.write_record, []

    def dies(root, record, replaces):
        if len(written) == 1:
            raise Killed
        write(root, record, replaces)
        written.append(record.unit)

    monkeypatch.setattr(driver, "write_record", dies)
    with pytest.raises(Killed):
        caption.run(job({}))
    monkeypatch.setattr(driver, "write_record", write)
    assert plan({}) == "3 shards, 1 done, 2 to do (0 new; 2 amended: captions not judged)"
    times = {path: path.stat().st_mtime_ns for path in (root / "commits").glob(f"{written[0]}.json")}
    done = {row["key"] for row in rows_of_unit(root, written[0])}

    server.requests.clear()
    [(_, account)] = caption.run(job({}))
    assert account.line().startswith("14 in = 13 out + 1 rejected (truncated_image 1); gate: 13 of 13 failed (loop 13")
    assert "12 passed when asked again, 1 still failing (loop 1" in account.line()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(done) == 5
    rows = rows_at(root)
    assert len(rows) == 14
    left = [row for row in rows if row["key"] not in done and row["status"] == "ok"]
    assert len(server.of_rows) == sum(row["num_attempts"] - 1 for row in left)  # only those, and each once
    good = {row["key"].partition("/")[2]: row["gate"] == [] and row["caption"] == GOOD for row in rows}
    assert [name for name, is_good in good.items() if not is_good] == ["broken", "stubborn"]
    assert len(list((root / "parts").iterdir())) == 3

    server.requests.clear()
    assert caption.run(job({}))[0][1] == account
    assert plan({}) == "3 shards, 3 done, 0 to do"
    assert plan(None) == "3 shards, 3 done, 0 to do"
    assert plan({"top_p": 0.5}) == "3 shards, 2 done, 1 to do (0 new; 1 amended: gate.top_p changed)"  # with a failure
    assert caption.run(job(None))[0][1] == account
    assert "[gate]" in (root / "job.toml").read_text()
    assert server.of_rows == []
    assert "gate: 13 of 13 failed" in (root / "summary.html").read_text()
    assert main(["status", str(root)]) == 0
    assert "gate      13 of 13 failed (loop 13" in capsys.readouterr().out
    assert main(["inspect", str(root), "--set", "num_samples=20"]) == 0
    shown = capsys.readouterr().out
    assert "gate           13 of 13 failed (loop 13" in shown
    assert re.search(r"gate     fails: .*loop.*; asked 3 time\(s\)", shown)


def rows_of_unit(root, unit):
    return pq.read_table(root / read_records(root)[unit].files[0].path).to_pylist()
