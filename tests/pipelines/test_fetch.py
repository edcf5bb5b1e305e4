"""`pixart fetch` unit by unit: what is written, that the next stage reads it, and that failed rows can be retried."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import Fetch
from pipelines.fetch import FetchStage, plan, prepare
from pixart_data.archives import seal_images
from pixart_data.commits import Record, file_sha256, write_record
from pixart_data.config import digest, load
from pixart_data.errors import ConfigError, DataError, TransientError
from pixart_data.records import FETCHED
from pixart_data.sections import Source
from pixart_data.sources import count_rows, find_units, read_samples
from tests.web import Web, http, in_turn, name_server, picture

QUICK = {"allow_private_addresses": True, "backoff_s": 0.01, "max_attempts": 1, "max_wait_s": 0.1}


@pytest.fixture(scope="module")
def web():
    with Web() as web:
        for i in range(12):
            web.pages[f"{i}.jpg"] = http(200, picture(seed=i, form="PNG" if i % 3 == 0 else "JPEG"))
        yield web


@pytest.fixture
def output(tmp_path):
    return tmp_path / "fetched"


@pytest.fixture
def make_job(tmp_path, output):
    def make(rows, name="list.parquet", downloads=None, **urls):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        else:
            path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        lists = {"paths": [str(path)], **urls}
        return Fetch(output=str(output), urls=lists, downloads={**QUICK, **(downloads or {})})

    return make


def rows_for(web, numbers):
    return [{"url": web.url(f"{i}.jpg"), "caption": f"caption {i}"} for i in numbers]


def fetch(job, report=lambda rows, rejected: None):
    run = prepare(job)
    stage = FetchStage(job)
    return [stage(unit, report) for unit in run.units]


def status_rows(output, record):
    (path,) = [output / file.path for file in record.files if file.path.startswith("rows/")]
    table = pq.read_table(path)
    assert table.schema.equals(FETCHED)
    rows = table.to_pylist()
    assert len(rows) == record.rows_in
    assert all((row["status"] == "ok") == (row["error"] is None) for row in rows)
    assert sum(row["error"] is None for row in rows) == record.rows_out
    return rows


def check_files(output, record):
    for file in record.files:
        assert (output / file.path).stat().st_size == file.size_bytes
        assert file_sha256(output / file.path) == file.sha256


def samples_of(path):
    source = Source(paths=[str(path)])
    units = find_units(source)
    samples = [sample for unit in units for sample in read_samples(unit, source)]
    assert sum(count_rows(unit) for unit in units) == len(samples)
    return samples


def test_a_unit_becomes_a_tar_that_the_next_stage_reads(web, output, make_job):
    rows = [*rows_for(web, range(5)), {"url": web.url("gone"), "caption": "lost"}, {"url": None, "caption": "none"}]
    (record,) = fetch(make_job(rows))
    seal_images(output, [record])
    check_files(output, record)
    assert (record.rows_in, record.rows_out) == (7, 5)
    assert record.rejected == {"bad_url": 1, "not_found": 1}
    assert record.facts == {"list": "list.parquet", "first_row": 0}
    tar = output / record.files[0].path
    assert tar.with_suffix(".parquet") == output / record.files[1].path
    for path in (output, output / "images", f"{output}/images/*.tar"):
        samples = samples_of(path)
        assert [sample.key for sample in samples] == [f"{tar.stem}/00000{i:04d}" for i in range(5)]
        assert [sample.caption for sample in samples] == [f"caption {i}" for i in range(5)]
        assert [sample.error for sample in samples] == [None] * 5
        pages = [web.pages[f"{i}.jpg"] for i in range(5)]
        assert all(page.endswith(sample.data) for page, sample in zip(pages, samples, strict=True))


def test_the_layout_is_that_of_img2dataset(web, output, make_job):
    (record,) = fetch(make_job([*rows_for(web, [0, 1]), {"url": web.url("gone"), "caption": "lost"}]))
    tar = output / record.files[0].path
    with tarfile.open(tar) as archive:
        names = archive.getnames()
        metadata = json.load(archive.extractfile("000000001.json"))
        assert archive.extractfile("000000001.txt").read() == b"caption 1"
    assert names == [f"00000000{i}.{end}" for i, kind in ((0, "png"), (1, "jpg")) for end in (kind, "txt", "json")]
    table = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
    assert table[1] == metadata
    assert metadata["sha256"] == status_rows(output, record)[1]["sha256"]
    assert (metadata["width"], metadata["original_height"], metadata["status"]) == (64, 48, "success")
    assert [row["status"] for row in table] == ["success", "success", "failed_to_download"]
    assert table[2]["error_message"] == "not_found: the server answered 404"
    assert (table[2]["http_status"], table[2]["num_attempts"], table[2]["width"]) == (404, 1, None)


def test_the_same_list_gives_the_same_bytes(web, make_job, tmp_path):
    job = make_job(rows_for(web, range(12)), rows_per_unit=5)
    first = fetch(job)
    again = fetch(job.model_copy(update={"output": str(tmp_path / "other")}))
    assert first == again
    assert [record.unit for record in first] == ["00000", "00001", "00002"]
    for record in first:
        for file in record.files:
            assert (tmp_path / "other" / file.path).read_bytes() == (tmp_path / "fetched" / file.path).read_bytes()


def test_keys_are_those_of_unit_and_row(web, output, make_job):
    records = fetch(make_job(rows_for(web, range(12)), rows_per_unit=5))
    keys = [row["key"] for record in records for row in status_rows(output, record)]
    assert keys == [f"{i // 5:05d}{i % 5:04d}" for i in range(12)]
    seal_images(output, records)
    assert len({sample.key for sample in samples_of(output)}) == 12


def test_a_url_that_comes_twice_is_asked_for_once(web, output, make_job):
    web.asked.clear()
    rows = [{"url": web.url("1.jpg"), "caption": f"{i}"} for i in range(3)] + [
        {"url": web.url("gone"), "caption": ""}
    ] * 2
    seen = []
    (record,) = fetch(make_job(rows), lambda rows, rejected: seen.append((rows, rejected)))
    assert (web.asked["1.jpg"], web.asked["gone"]) == (1, 1)
    assert (record.rows_out, record.rejected) == (3, {"not_found": 2})
    assert seen[-1] == (5, 2)
    seal_images(output, [record])
    assert [sample.caption for sample in samples_of(output)] == ["0", "1", "2"]


def test_jsonl_with_bad_lines(web, output, make_job, monkeypatch):
    name_server(monkeypatch)
    rows = [*rows_for(web, [1]), "not json", "[1]", "", {"url": web.url("2.jpg")}, {"url": 7}]
    rows += [{"url": web.url("4.jpg"), "caption": 5}, {"url": "http://gone.invalid/", "caption": "\ud800"}]
    (record,) = fetch(make_job(rows, "list.jsonl"))
    assert (record.rows_in, record.rows_out) == (7, 2)
    assert record.rejected == {"bad_row": 3, "bad_url": 1, "host_not_found": 1}
    found = status_rows(output, record)
    assert [row["key"][-1] for row in found] == ["0", "1", "2", "4", "5", "6", "7"]
    assert found[3]["caption"] is None
    seal_images(output, [record])
    assert [sample.caption for sample in samples_of(output)] == ["caption 1", None]


def test_slices_of_a_large_row_group(web, output, make_job, tmp_path):
    job = make_job(rows_for(web, range(12)), rows_per_unit=5)
    pq.write_table(pa.Table.from_pylist(rows_for(web, range(12))), tmp_path / "list.parquet")  # one row group
    found = [row["caption"] for record in fetch(job) for row in status_rows(output, record)]
    assert found == [f"caption {i}" for i in range(12)]


def test_nothing_won_leaves_no_tar(web, output, make_job):
    (record,) = fetch(make_job([{"url": web.url("gone"), "caption": ""}]))
    assert [Path(file.path).parent.name for file in record.files] == ["rows"]
    seal_images(output, [record])
    with pytest.raises(DataError, match="not one of its 1 URLs gave an image"):
        find_units(Source(paths=[str(output)]))


def test_an_unfinished_output_is_no_source(web, output, make_job):
    fetch(make_job(rows_for(web, [1])))
    (output / "commits").mkdir()
    with pytest.raises(DataError, match="run `pixart fetch` on it to the end"):
        find_units(Source(paths=[str(output)]))


def test_a_machine_without_network_fails_the_unit_instead_of_its_rows(make_job, output, monkeypatch):
    name_server(monkeypatch)
    rows = [{"url": f"http://host-{i}.invalid/a.jpg", "caption": ""} for i in range(60)]
    with pytest.raises(TransientError, match="expected answers from some of 60 hosts, found none"):
        fetch(make_job(rows))
    assert not list(output.rglob("*.parquet"))
    (record,) = fetch(make_job(rows[:5]))
    assert record.rejected == {"host_not_found": 5}


def test_an_output_on_an_object_store(web, bucket, make_job):
    job = make_job([*rows_for(web, range(3)), {"url": web.url("gone"), "caption": ""}])
    job = job.model_copy(update={"output": f"{bucket}/laion/fetched"})
    (unit,) = prepare(job).units
    stage = FetchStage(job)
    record = stage(unit, lambda *_: None)
    seal_images(stage.root, [stage.retry(unit, ["not_found"], record, lambda *_: None)])
    for path in (job.output, f"{job.output}/images/*.tar"):
        assert [sample.caption for sample in samples_of(path)] == ["caption 0", "caption 1", "caption 2"]


# Retry


def test_a_retry_asks_for_the_failed_rows_only_and_adds_a_tar(web, output, make_job):
    page = http(200, picture(seed=99))
    web.pages |= {"later.jpg": in_turn(http(503), page), "never.jpg": http(500)}
    rows = [
        *rows_for(web, [1]),
        {"url": web.url("later.jpg"), "caption": "late"},
        {"url": web.url("never.jpg"), "caption": "never"},
        {"url": web.url("gone"), "caption": "gone"},
        {"url": web.url("2.jpg"), "caption": 5},
    ]
    job = make_job(rows, "list.jsonl")
    (unit,) = prepare(job).units
    stage = FetchStage(job)
    before = stage(unit, lambda *_: None)
    assert before.rejected == {"bad_row": 1, "not_found": 1, "server_error": 2}
    web.asked.clear()
    seen = []
    after = stage.retry(unit, ["server_error", "bad_row"], before, lambda rows, rejected: seen.append((rows, rejected)))
    check_files(output, after)
    assert {path: count for path, count in web.asked.items() if "robots" not in path} == {
        "later.jpg": 1,
        "never.jpg": 1,
    }
    assert seen[-1] == (2, 1)
    assert (after.rows_in, after.rows_out) == (5, 2)
    assert after.rejected == {"bad_row": 1, "not_found": 1, "server_error": 1}
    assert after.files[:2] == before.files[:2]
    assert len(after.files) == 5
    found = status_rows(output, after)
    assert [row["error"] for row in found] == [None, None, "server_error", "not_found", "bad_row"]
    assert [row["shard"] for row in found[:2]] == [after.files[0].path, after.files[2].path]
    sidecar = pq.read_table(output / after.files[3].path).to_pylist()
    assert [row["caption"] for row in sidecar] == ["late"]
    seal_images(output, [after])
    samples = samples_of(output)
    assert [(sample.caption, sample.error) for sample in samples] == [("caption 1", None), ("late", None)]
    assert page.endswith(samples[1].data)


def test_a_retry_that_wins_nothing_changes_only_the_table(web, output, make_job):
    job = make_job([*rows_for(web, [1]), {"url": web.url("gone"), "caption": ""}])
    (unit,) = prepare(job).units
    stage = FetchStage(job)
    before = stage(unit, lambda *_: None)
    after = stage.retry(unit, ["not_found"], before, lambda *_: None)
    assert after == before


def test_a_retry_without_network_fails_the_unit_instead_of_its_rows(web, output, make_job, monkeypatch):
    name_server(monkeypatch)
    job = make_job([{"url": f"http://host-{i}.invalid/a.jpg", "caption": ""} for i in range(60)])
    (unit,) = prepare(job).units
    stage = FetchStage(job)
    with monkeypatch.context() as lenient:
        lenient.setattr("pipelines.fetch._JUDGED_FROM_HOSTS", 61)
        gone = stage(unit, lambda *_: None)
    assert stage.retry(unit, ["host_not_found"], gone, lambda *_: None) == gone  # as before: names that are gone
    answered = [row | {"error": "server_error"} for row in status_rows(output, gone)]
    monkeypatch.setattr("pipelines.fetch.read_status", lambda root, record: answered)
    with pytest.raises(TransientError, match="expected answers from some of 60 hosts, found none"):
        stage.retry(unit, ["server_error"], gone, lambda *_: None)


# Lists that are renumbered


@pytest.fixture
def lists(tmp_path, output):
    """Three lists, `a` of two units, and the job over paths in their folder."""
    folder = tmp_path / "lists"
    folder.mkdir()

    def write(name, num_rows):
        rows = [{"url": f"http://{name}/{i}", "caption": ""} for i in range(num_rows)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")

    def make_job(*names, **urls):
        paths = [str(folder / name) for name in names] or [str(folder)]
        return Fetch(output=str(output), urls={"paths": paths, "rows_per_unit": 5, **urls})

    for name, num_rows in {"a": 7, "c": 3, "e": 4}.items():
        write(name, num_rows)
    make_job.write = write
    return make_job


def commit(job, *units):
    """Commit units, all without naming any, as if they had been fetched."""
    run = prepare(job)
    for unit in run.units:
        if not units or unit.id in units:
            decided = run.settings(unit)
            write_record(run.root, Record(unit.id, digest(decided), decided, 0, 0, {}, []))


def todo(job):
    [(_, found)] = plan(job)
    return [unit.id for unit, _ in found.todo]


@pytest.mark.parametrize(
    ("committed", "moved"),
    [((), "c.parquet renumbered from 00002 to 00003, and 1 more with it"), (("00002",), "c.parquet renumbered from")],
)
def test_a_new_list_among_old_ones_is_not_planned(lists, committed, moved):
    commit(lists(), *committed)
    lists.write("b", 2)
    with pytest.raises(ConfigError) as error:
        plan(lists())
    assert str(error.value).startswith("urls.paths: expected the lists of the earlier runs in their old order and new")
    assert moved in str(error.value)
    assert "name the lists in the old order in urls.paths" in str(error.value)
    named = lists("a.parquet", "c.parquet", "e.parquet", "*.parquet")  # each is taken once
    assert todo(named) == (["00004"] if not committed else ["00000", "00001", "00003", "00004"])


def test_lists_that_are_swapped_removed_or_cut_otherwise_are_not_planned(lists):
    commit(lists())
    for job in (lists("c.parquet", "a.parquet"), lists("c.parquet", "e.parquet"), lists(rows_per_unit=9)):
        with pytest.raises(ConfigError, match="c.parquet renumbered from 00002 to 0000"):
            plan(job)


def test_lists_that_keep_their_numbers_are_planned(lists):
    commit(lists())
    assert todo(lists("a.parquet")) == []
    lists.write("f", 1)
    assert todo(lists()) == ["00004"]
    lists.write("c", 4)
    assert todo(lists()) == ["00002", "00004"]
    lists.write("f", 7)
    assert todo(lists(caption_column="")) == ["00000", "00001", "00002", "00003", "00004", "00005"]


def test_two_lists_of_one_content_are_planned(lists):
    lists.write("c", 4)
    (Path(lists().urls.paths[0]) / "e.parquet").write_bytes((Path(lists().urls.paths[0]) / "c.parquet").read_bytes())
    commit(lists(), "00002")
    assert todo(lists()) == ["00000", "00001", "00003"]


# Settings


def test_what_decides_the_result_and_what_does_not(web, make_job):
    rows = rows_for(web, range(2))

    def decided(**downloads):
        run = prepare(make_job(rows, downloads=downloads))
        return digest(run.settings(run.units[0]))

    assert decided() == decided(concurrency=3, total_timeout_s=5.0, max_attempts=9, contact="a@b.example")
    changes = [{"min_side_px": 9}, {"robots": False}, {"opt_out_directives": []}, {"max_bytes": 5}, {"check": "header"}]
    assert len({decided(), *(decided(**change) for change in changes)}) == 6


def test_a_changed_list_is_fetched_again(web, make_job):
    prints = [prepare(make_job(rows_for(web, range(n)))).units[0].fingerprint for n in (2, 3, 2)]
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"url_column": "URL"}, "expected a column 'URL', found url, caption; set urls.url_column"),
        ({"caption_column": "TEXT"}, "expected a column 'TEXT', found url, caption; set urls.caption_column, to \"\""),
    ],
)
def test_a_missing_column_is_named(web, make_job, columns, message):
    with pytest.raises(ConfigError) as error:
        prepare(make_job(rows_for(web, [1]), **columns))
    assert message in str(error.value)


def test_lists_without_captions(web, output, make_job):
    (record,) = fetch(make_job([{"url": web.url("1.jpg")}], caption_column=""))
    with tarfile.open(output / record.files[0].path) as archive:
        assert archive.getnames() == ["000000000.jpg", "000000000.json"]
    seal_images(output, [record])
    assert [sample.caption for sample in samples_of(output)] == [None]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["nowhere/*.parquet"], "nothing matches"),
        (["s3://bucket/list.parquet"], "expected a local path"),
        ([__file__], "expected .parquet, .jsonl or a folder"),
    ],
)
def test_paths_that_are_no_lists(paths, message, tmp_path):
    with pytest.raises(ConfigError, match=r"^urls.paths: .*" + message):
        prepare(Fetch(output=str(tmp_path), urls={"paths": paths}))


def test_folders_of_lists_in_order_and_once(tmp_path, web):
    for name in ("b", "a"):
        pq.write_table(pa.Table.from_pylist(rows_for(web, [1])), tmp_path / f"{name}.parquet")
    (tmp_path / "empty").mkdir()
    run = prepare(Fetch(output=str(tmp_path / "o"), urls={"paths": [str(tmp_path), f"{tmp_path}/*.parquet"]}))
    assert [(unit.id, Path(unit.file.path).stem) for unit in run.units] == [("00000", "a"), ("00001", "b")]
    assert [run.count(unit) for unit in run.units] == [1, 1]
    with pytest.raises(ConfigError, match="holds no .parquet or .jsonl file"):
        prepare(Fetch(output=str(tmp_path / "o"), urls={"paths": [str(tmp_path / "empty")]}))


def test_the_shipped_job_file_is_for_laion():
    job = load(Fetch, Path(__file__).parents[2] / "jobs/files/fetch.toml")
    assert (job.urls.url_column, job.urls.caption_column) == ("URL", "TEXT")
    assert not job.downloads.allow_private_addresses
    assert job.cluster.max_rejected == 0.5
