"""Captioning on Ray: by servers as by the model in the worker, and several captions of each image."""

import json
import logging
import random
import shutil
import threading
import time

import pyarrow.parquet as pq
import pytest

from pipelines import caption, extract
from pipelines.caption import CaptionStage
from pipelines.config import Caption, Extract
from pixart_data import chats
from pixart_data.config import load
from pixart_data.errors import ConfigError, JobError
from pixart_data.shards import FeatureSet
from pixart_data.sources import find_units
from tests.chats import ChatServer, answer, completion, status

pytestmark = pytest.mark.usefixtures("ray_here")

MODEL = "org/model"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(chats, "_FIRST_PAUSE_S", 0.01)
    with ChatServer() as running:
        yield running


@pytest.fixture
def folder(pictures, tmp_path):
    """The demo's pictures, two of them without a raw caption, and one that is broken."""
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    (copy / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return copy


def make_job(folder, output, **captioner):
    section = {"model": MODEL, "max_new_tokens": 6, **captioner}
    given = {"output": str(output), "source": {"paths": [str(folder)], "rows_per_unit": 5}, "captioner": section}
    return load(Caption, None, [], {**given, "cluster": {"num_workers": 1, "cpus_per_worker": 0.1}})


def served(server, **settings):
    return {"urls": [server.url], "patience_s": 0.0, "max_attempts": 2, "concurrency": 4, **settings}


def rows_of(job):
    return {row["key"].partition("/")[2]: row for row in pq.read_table(f"{job.output}/parts").to_pylist()}


def nothing(rows, rejected):
    """Report to nobody."""


def test_servers_write_the_table_that_the_model_in_the_worker_writes(folder, miniatures, served_llava, tmp_path):
    same = {"model": miniatures["llava"], "prompts": {"short": "In short?"}, "prompt_with_caption": "{caption}, go on"}
    here = make_job(folder, tmp_path / "here", batch_size=3, **same)
    there = make_job(folder, tmp_path / "there", server=served_llava, **same)
    accounts = [caption.run(job)[0][1] for job in (here, there)]
    assert accounts[0] == accounts[1]
    assert accounts[0].line() == "13 in = 12 out + 1 rejected (truncated_image 1)"
    ends = ["finish_reason", "num_tokens", "finish_reason_short", "num_tokens_short"]
    tables = [pq.read_table(f"{job.output}/parts").drop_columns(ends) for job in (here, there)]
    assert tables[0].to_pylist() == tables[1].to_pylist()  # the server counts the token that ends an answer, too
    assert tables[0]["caption_short"].null_count == 1
    assert caption.prepare(here).needs_gpu
    assert not caption.prepare(there).needs_gpu


def test_rows_keep_the_order_of_the_source_whatever_the_answers_take(folder, server, tmp_path):
    rng = random.Random(0)

    def slowly(handler, request):
        time.sleep(rng.uniform(0.0, 0.1))
        answer(handler, request)

    server.usual = slowly
    job = make_job(folder, tmp_path / "out", server=served(server))
    caption.run(job)
    keys = [
        key for part in sorted((tmp_path / "out/parts").iterdir()) for key in pq.read_table(part)["key"].to_pylist()
    ]
    assert keys == sorted(keys)
    assert len(keys) == 13
    assert 1 < server.max_in_flight <= 4


def test_a_row_is_rejected_for_want_of_its_main_caption_only(folder, server, tmp_path, caplog):
    def picky(handler, request):
        if request.prompt == "Main, house pic":
            handler.say(200, completion("", 90, 1))
        elif request.prompt == "Main, farm house":
            handler.say(400, "no farms")
        elif request.prompt == "Short?":
            handler.say(200, completion("" if request.image.size[0] > 400 else "short", 80, 2, "length"))
        else:
            answer(handler, request)

    for path in folder.glob("*.txt"):
        path.write_text(path.stem.replace("_", " "))
    (folder / "house_day.txt").write_text("house pic")
    (folder / "farm.txt").write_text("farm house")
    server.usual = picky
    prompts = {"short": "Short?", "quoting": "{caption}?"}
    job = make_job(
        folder,
        tmp_path / "out",
        server=served(server, max_side_px=500),
        prompt="Main",
        prompt_with_caption="Main, {caption}",
        prompts=prompts,
    )
    with caplog.at_level(logging.INFO):
        [(_, account)] = caption.run(job)
    assert account.line() == "13 in = 10 out + 3 rejected (empty_caption 1, refused 1, truncated_image 1)"
    rows = rows_of(job)
    assert rows["house_day"]["error"] == "empty_caption"
    assert rows["house_day"]["prompt"] == "Main, house pic"
    assert (rows["farm"]["error"], rows["farm"]["caption"]) == ("refused", None)
    assert "no farms" in rows["farm"]["detail"]
    orchard, lodge = rows["orchard"], rows["lodge"]
    assert orchard["status"] == "ok"
    assert (orchard["caption_short"], orchard["error_short"]) == (None, "empty_caption")
    assert orchard["caption_quoting"].endswith("orchard?")
    assert [lodge[f"{name}_short"] for name in ("caption", "finish_reason", "num_tokens")] == ["short", "length", 2]
    assert lodge["error_short"] is None
    assert (lodge["caption_quoting"], lodge["error_quoting"]) == (None, "no_caption")
    num_wide = sum(row["error_short"] == "empty_caption" for row in rows.values())
    assert 0 < num_wide < 12
    assert f"caption: caption_short: images without it, beside those rejected: empty_caption {num_wide}" in caplog.text
    assert "caption: caption_quoting: images without it, beside those rejected: no_caption 2" in caplog.text


def test_what_does_not_decide_the_captions_redoes_nothing(folder, server, tmp_path):
    def todo(settings=None, **captioner):
        job = make_job(folder, tmp_path / "out", server=served(server, **(settings or {})), **captioner)
        [(run, plan)] = caption.plan(job)
        return plan.line(run).partition(" (")[2].partition(")")[0]

    caption.run(make_job(folder, tmp_path / "out", server=served(server)))
    same = {"urls": ["http://elsewhere/v1"], "concurrency": 9, "timeout_s": 1.0, "api_key_env": "KEY"}
    assert todo(same) == ""
    assert todo({"jpeg_quality": 70}) == "0 new; 3 redone: captioner.server.jpeg_quality changed"
    assert todo(prompts={"short": "x"}) == "0 new; 3 redone: captioner.prompts changed"
    assert todo(model="org/other") == "0 new; 3 redone: captioner.model changed"


@pytest.mark.parametrize(("temperature", "decides"), [(0.0, False), (0.7, True)])
def test_the_batch_decides_what_is_drawn_here(folder, server, miniatures, tmp_path, temperature, decides):
    def settings(batch_size, **captioner):
        captioner = {"batch_size": batch_size, "temperature": temperature, **captioner}
        run = caption.prepare(make_job(folder, tmp_path / "out", **captioner))
        return run.settings(run.units[0])

    here = [settings(batch_size, model=miniatures["llava"]) for batch_size in (2, 3)]
    assert (here[0] != here[1]) == decides
    there = [settings(batch_size, server=served(server)) for batch_size in (2, 3)]
    assert there[0] == there[1]  # each image has a seed of its own


def test_a_server_that_is_away_for_a_while_costs_a_shard_an_attempt(folder, server, tmp_path, caplog):
    server.plan.extend([status(429)] * 4)
    with caplog.at_level(logging.INFO):
        [(_, account)] = caption.run(make_job(folder, tmp_path / "out", server=served(server)))
    assert account.rows_out == 12
    assert "captioner.server: expected an answer, found none" in caplog.text


def test_a_server_that_is_not_there_ends_the_job_with_a_line(folder, tmp_path):
    with ChatServer() as gone:
        job = make_job(folder, tmp_path / "out", server=served(gone))
    with pytest.raises(JobError, match="captioner.server: .* cannot be reached: .*; start the server"):
        caption.run(job)


def test_rejected_rows_are_asked_about_again(folder, server, tmp_path):
    job = make_job(folder, tmp_path / "out", server=served(server))
    [unit, *_] = find_units(job.source)
    stage = CaptionStage(job)
    server.plan.extend([status(400, "not now"), answer, status(400, "not now")])
    before = stage(unit, nothing)
    assert before.rejected["refused"] == 2
    num_asked = len(server.of_rows)
    after = stage.retry(unit, ("refused",), before, nothing)
    assert len(server.of_rows) - num_asked == 2
    assert after.rejected == {reason: count for reason, count in before.rejected.items() if reason != "refused"}
    assert after.rows_in == before.rows_in
    fresh = CaptionStage(make_job(folder, tmp_path / "fresh", server=served(server)))(unit, nothing)
    assert [file.sha256 for file in after.files] == [file.sha256 for file in fresh.files]
    stage.captioner.close()


def test_a_slow_server_holds_back_the_decoding(server, tmp_path, pictures):
    """Prepared pictures wait for the server, not in memory."""
    folder = tmp_path / "many"
    folder.mkdir()
    source = next(pictures.glob("*.png"), None) or next(pictures.glob("*.jpg"))
    for i in range(60):
        (folder / f"{i:02d}{source.suffix}").symlink_to(source)
    job = make_job(folder, tmp_path / "out", server=served(server, concurrency=2))
    job = job.model_copy(update={"source": job.source.model_copy(update={"rows_per_unit": 60})})
    stage = CaptionStage(job)
    opened = threading.Event()
    server.usual = lambda handler, request: (opened.wait(60), answer(handler, request))
    prepared = []
    prepare = stage.captioner.prepare
    stage.captioner.prepare = lambda image: (prepared.append(image.size), prepare(image))[1]
    done = []
    working = threading.Thread(target=lambda: done.append(stage(find_units(job.source)[0], nothing)))
    working.start()
    deadline_s = time.monotonic() + 20
    while len(server.of_rows) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    working.join(1.0)  # time to prepare more, if it were not held back
    assert len(server.of_rows) == 2
    assert 2 <= len(prepared) <= 2 * 2 + 2 * 2  # of which one for each decoding thread is still pixels
    opened.set()
    working.join(60)
    assert done[0].rows_out == len(prepared) == 60
    stage.captioner.close()


# Features of several captions


def captions_file(tmp_path, num_rows=110):
    rows = [{"key": f"a/{i}", "caption": f"long {i}", "caption_short": f"short {i}"} for i in range(num_rows)]
    for row in rows[::2]:
        row["raw_caption"] = f"raw {row['key']}"
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps({"raw_caption": None, **row}) + "\n" for row in rows))
    return path


def extract_job(tmp_path, miniatures, more, **text):
    given = {"output": str(tmp_path / "features"), "captions": {"path": str(captions_file(tmp_path)), "more": more}}
    given |= {"text": {"model": miniatures["t5"], **text}, "cluster": {"num_workers": 1, "cpus_per_worker": 0.1}}
    return load(Extract, None, [], given)


def test_each_column_of_captions_becomes_a_text_set(miniatures, tmp_path):
    job = extract_job(tmp_path, miniatures, {"text-short": "caption_short", "text-raw": "raw_caption"})
    accounts = {run.root.name: account for run, account in extract.run(job)}
    assert {name: account.rows_out for name, account in accounts.items()} == {
        "text": 110,
        "text-short": 110,
        "text-raw": 55,  # half of the images have none, which is no reason to fail
    }
    for name, first in (("text", "long 0"), ("text-short", "short 0"), ("text-raw", "raw a/0")):
        features = FeatureSet(tmp_path / "features" / name)
        row = {row["key"]: row for row in features.index.to_pylist()}["a/0"]
        assert row["caption"] == first
        assert features.manifest.model["null"]["num_tokens"] == 1
        features.close()
    fewer = extract_job(tmp_path, miniatures, {"text-short": "raw_caption"})
    lines = [plan.line(run) for run, plan in extract.plan(fewer)]
    assert [line.partition(" -> ")[0] for line in lines] == [
        "extract text: 2 shards, 2 done, 0 to do",
        "extract text-short: 2 shards, 0 done, 2 to do (0 new; 2 redone: captions.column changed)",
    ]


def test_columns_and_names_of_text_sets_are_checked_before_any_work(miniatures, tmp_path):
    missing = extract_job(tmp_path, miniatures, {"text-dense": "caption_dense"})
    with pytest.raises(ConfigError, match="expected a column 'caption_dense', .*; set captions.more.text-dense"):
        extract.plan(missing)
    with pytest.raises(ConfigError, match="captions.more: expected names of their own, found 'text' twice; rename one"):
        extract_job(tmp_path, miniatures, {"text": "caption_short"})
    with pytest.raises(ConfigError, match="more: expected names of folders, e.g. text-short, found '../x'; rename it"):
        extract_job(tmp_path, miniatures, {"../x": "caption_short"})
    given = {"output": "o", "source": {"paths": ["x"]}, "captions": {"path": "c", "more": {"a": "b"}}, "image": {}}
    with pytest.raises(ConfigError, match=r"captions.more: expected a section \[text\] beside it, found none; add one"):
        load(Extract, None, [], given)
