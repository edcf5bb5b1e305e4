import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cli import main
from pipelines import compact, extract
from pipelines.config import Cluster, Compact, Extract
from pipelines.driver import make_plan
from pixart_data.commits import COMMITS, read_records, write_record
from pixart_data.config import digest
from pixart_data.editions import Original
from pixart_data.entries import key_hash
from pixart_data.errors import ConfigError, DataError
from pixart_data.packs import GENERATIONS
from pixart_data.sections import ImageFeatures, Source, TextFeatures
from pixart_data.storage import location
from pixart_data.verification import verify
from tests.sealing import RATIOS, contents, write_images, write_texts

ONE_WORKER = Cluster(num_workers=1, cpus_per_worker=0.1)


def job(source, output, shard_bytes=16000, **more):
    """A job whose shards are smaller than a job file may ask for."""
    return Compact(path=str(source), output=str(output), **more).model_copy(update={"shard_bytes": shard_bytes})


def do(compaction, until=None):
    """What the driver does, in this process, without `sweep`; `until` units are left undone, and nothing is sealed."""
    for run, finish in compact.prepare(compaction, write=True):
        stage, records = run.build(), read_records(run.root)
        for unit in run.units[:until]:
            decided = run.settings(unit)
            if unit.id not in records or records[unit.id].digest != digest(decided):
                record = stage(unit, lambda count, num_rejected: None)
                records[unit.id] = replace(record, settings=decided, digest=digest(decided))
                write_record(run.root, records[unit.id])
        if until is None:
            finish([records[unit.id] for unit in run.units])


def files(root):
    """All files but leases, which hold a random token."""
    found = (path for path in root.rglob("*") if path.is_file() and ".lease" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def whole(root):
    return [finding for finding in verify(root) if finding.problem] == []


@pytest.fixture(autouse=True, scope="module")
def no_power_cuts():
    """Flushing to the disk is most of what small shards cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty images in three units, fifty captions that repeat within and across units, and six texts without image."""
    keys = [f"s/{i:03d}" for i in range(60)]
    ratios = [RATIOS[i * i % 3 if i % 4 else 2] for i in range(60)]
    pairs = list(zip(keys, ratios, strict=True))
    root = tmp_path_factory.mktemp("sealed") / "source"
    write_images(root / "256px", {f"u{j}": pairs[20 * j : 20 * j + 20] for j in range(3)}, True, ["s/bad"])
    captions = [(key, None if i % 7 == 3 else f"caption {i % 11}" * (1 + i % 3)) for i, key in enumerate(keys)]
    captions += [(f"t/{i}", f"caption {i}") for i in range(6)]
    write_texts(root / "text", {f"u{j}": captions[22 * j : 22 * j + 22] for j in range(3)})
    return root


def test_a_compacted_dataset_holds_the_same_samples_in_few_shards(source, tmp_path, capsys):
    output = tmp_path / "out"
    do(job(source, output, shard_bytes=1 << 20))
    for name, num_shards in {"256px": 3, "text": 2}.items():
        assert contents(output / name) == contents(source / name)
        before, after = (Original(root / name).manifest for root in (source, output))
        assert (after.counts, after.policy, after.codec) == (before.counts, before.policy, before.codec)
        assert len(after.provenance["compacted_from"]) == 64
        assert len(after.shards) == num_shards < len(before.shards)
    assert whole(output)
    assert main(["diff", str(source), str(output)]) == 0
    assert "no difference" in capsys.readouterr().out


@st.composite
def datasets(draw):
    """(key, ratio, caption) of each sample, by unit; without a ratio there is no image. Some captions are equal."""
    caption = st.none() | st.text("ab", max_size=4) | st.text(min_size=5, max_size=300)
    sample = st.tuples(st.none() | st.sampled_from(RATIOS), caption)
    units = draw(st.lists(st.lists(sample, max_size=12), min_size=1, max_size=4))
    keys = iter(draw(st.permutations(range(sum(map(len, units))))))
    return [[(f"{'k' * (next(keys) % 4 * 40)}{i}-{j}", *s) for j, s in enumerate(unit)] for i, unit in enumerate(units)]


@settings(max_examples=8, deadline=None)
@given(units=datasets(), shard_bytes=st.sampled_from([1500, 6000, 1 << 20]), flips=st.booleans())
def test_any_dataset_keeps_every_bit(tmp_path_factory, units, shard_bytes, flips):
    root = tmp_path_factory.mktemp("any")
    images = {f"u{i}": [(key, ratio) for key, ratio, _ in unit if ratio] for i, unit in enumerate(units)}
    texts = {f"u{i}{'~' * (i % 2)}": [(key, caption) for key, _, caption in unit] for i, unit in enumerate(units)}
    write_images(root / "in" / "256px", images, flips)
    write_texts(root / "in" / "text", texts)
    do(job(root / "in", root / "out", shard_bytes))
    for name in ("256px", "text"):
        assert contents(root / "out" / name) == contents(root / "in" / name)
    assert whole(root / "out")
    texts = Original(root / "out" / "text")
    stored = {(row["shard"], row["offset_bytes"]) for _, table in texts.tables() for row in table.to_pylist()}
    rows = contents(texts.root)[0]
    distinct = {(row["caption"], row["crc32"]) for row, _ in rows.values() if row["caption"]}
    empty = [
        unit for unit in units if any(caption == "" for _, _, caption in unit)
    ]  # these prove nothing by being equal
    assert len(stored) == len(distinct) + len(empty)


def test_samples_are_shuffled_in_each_bucket_and_texts_follow(source, tmp_path):
    do(job(source, tmp_path / "out", shard_bytes=1 << 20))
    images, texts = (Original(tmp_path / "out" / name) for name in ("256px", "text"))
    place = {}
    for number in range(3):
        keys = images.entries["key"][images.entries["bucket"] == number].tolist()
        assert keys == sorted(keys)
        place |= {key: (number, key) for key in keys}
    offsets, rank = texts.entries["offset"], [place.get(key, (9, key)) for key in texts.entries["key"].tolist()]
    first_of = {int(offset): min(r for r, o in zip(rank, offsets, strict=True) if o == offset) for offset in offsets}
    assert list(first_of) == sorted(first_of)
    assert list(first_of.values()) == sorted(first_of.values())
    rows = contents(texts.root)[0]
    assert len(first_of) == len({row["caption"] for row, _ in rows.values()}) < len(rows) - 20


def test_equal_captions_with_other_features_stay_two(tmp_path):
    write_texts(tmp_path / "in" / "text", {"u~0": [("a", "red")], "u~1": [("b", "red"), ("c", "red")]})
    do(job(tmp_path / "in", tmp_path / "out"))
    text = Original(tmp_path / "out" / "text")
    offset = dict(zip(text.entries["key"].tolist(), text.entries["offset"].tolist(), strict=True))
    assert offset[key_hash("b")] == offset[key_hash("c")] != offset[key_hash("a")]


def test_the_same_source_gives_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        do(job(source, tmp_path / name))
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("until", [0, 1, -1])
def test_killed_in_the_middle_and_run_again_it_gives_the_same_bytes(source, tmp_path, until):
    do(job(source, tmp_path / "straight"))
    do(job(source, tmp_path / "killed"), until)
    assert not (tmp_path / "killed/text/manifest.json").exists()
    do(job(source, tmp_path / "killed", shard_bytes=1 << 20))  # what was planned stays planned
    assert files(tmp_path / "killed") == files(tmp_path / "straight")


def test_a_pack_that_was_damaged_is_made_again_when_its_record_is_deleted(source, tmp_path):
    do(job(source, tmp_path / "out"))
    before = files(tmp_path / "out")
    (tmp_path / "out/256px" / COMMITS / "pack-000-000001.json").unlink()
    [shard] = (tmp_path / "out/256px").glob("*/pack-000-000001-*.tar")
    shard.write_bytes(b"damaged")
    [image_plan, text_plan] = [plan for _, plan in compact.plan(job(source, tmp_path / "out"))]
    assert [unit.id for unit, _ in image_plan.todo] == ["pack-000-000001"]
    assert text_plan.todo == []
    do(job(source, tmp_path / "out"))
    assert files(tmp_path / "out") == before


def test_a_source_that_grew_adds_packs_and_leaves_the_others_alone(tmp_path):
    units = {f"u{j}": [(f"{j}/{i}", RATIOS[(i + j) % 3], f"caption {i}") for i in range(15)] for j in range(2)}
    more = {"a": [(f"a/{i}", "1.00", f"caption {i}") for i in range(12)], **units}
    more["z"] = [(f"z/{i}", "0.50", f"other caption {i}" if i else None) for i in range(20)]

    def extract(some):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        write_images(tmp_path / "in/256px", {unit: [(key, r) for key, r, _ in s] for unit, s in some.items()})
        write_texts(tmp_path / "in/text", {unit: [(key, c) for key, _, c in s] for unit, s in some.items()})

    extract(units)
    do(job(tmp_path / "in", tmp_path / "out"))
    before = {path: data for path, data in files(tmp_path / "out").items() if path.endswith((".tar", ".arrow"))}
    extract(more)
    do(job(tmp_path / "in", tmp_path / "out"))
    after = files(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    for name in ("256px", "text"):
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "in" / name)
        fresh = [path for path in after if path.startswith(name) and "/pack-001-" in path and path.endswith(".tar")]
        assert fresh
        assert f"{name}/{GENERATIONS}/001.json" in after
    assert whole(tmp_path / "out")
    text = Original(tmp_path / "out/text")
    stored = set(zip(text.entries["shard"].tolist(), text.entries["offset"].tolist(), strict=True))
    assert len(stored) == 15 + 19  # captions of the new unit "a" are those of earlier packs
    do(job(tmp_path / "in", tmp_path / "out"))
    assert files(tmp_path / "out") == after


def test_new_sources_are_appended_under_stable_ids(pictures, miniatures, tmp_path):
    """`extract` with one more source, then `compact` again; in this process, as the driver does it."""
    (tmp_path / "early").mkdir()
    for number, path in enumerate(sorted(pictures.glob("*"))[:6]):
        shutil.copy(path, tmp_path / "early" / f"{number}{path.suffix}")

    def extracted(*folders):
        given = {"source": Source(paths=[str(folder) for folder in folders]), "output": str(tmp_path / "features")}
        image, text = ImageFeatures(model=miniatures["vae"]), TextFeatures(model=miniatures["t5"])
        num_new = []
        for run, finish in extract._runs(Extract(**given, image=image, text=text)):
            plan, stage = make_plan(run), run.build()
            for unit, decided in plan.todo:
                record = stage(unit, lambda count, num_rejected: None)
                plan.done[unit.id] = replace(record, settings=decided, digest=digest(decided))
                write_record(run.root, plan.done[unit.id])
            assert not plan.redo
            num_new.append(len(plan.todo))
            finish([plan.done[unit.id] for unit in run.units])
        return num_new

    assert extracted(pictures) == [1, 2]  # and the empty caption
    do(job(tmp_path / "features", tmp_path / "out"))
    before = {path: data for path, data in files(tmp_path / "out").items() if path.endswith(".tar")}
    assert extracted(tmp_path / "early", pictures) == [1, 1]
    do(job(tmp_path / "features", tmp_path / "out"))
    after = {path: data for path, data in files(tmp_path / "out").items() if path.endswith(".tar")}
    assert before.items() < after.items()
    for name in ("256px", "text"):
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "features" / name)
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("is_sealed", [True, False])
@pytest.mark.parametrize(("left", "count", "first"), [("ab", 1, "c"), ("", 3, "[abc]")])
def test_samples_that_vanished_are_told_of(tmp_path, left, count, first, is_sealed):
    write_images(tmp_path / "in/256px", {"u": [(key, "1.00") for key in "abc"]})
    do(job(tmp_path / "in", tmp_path / "out"), None if is_sealed else 1)
    shutil.rmtree(tmp_path / "in")
    write_images(tmp_path / "in/256px", {"u": [(key, "1.00") for key in left]})
    told = rf"{count} sample\(s\) changed or vanished .* is {first}, which vanished; .* a new folder"
    with pytest.raises(DataError, match=told):
        compact.plan(job(tmp_path / "in", tmp_path / "out"))


def test_samples_that_changed_are_told_of_also_where_they_share_a_member(tmp_path):
    def extract(caption):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        write_texts(tmp_path / "in/text", {"u": [("a", "red"), ("b", "red"), ("c", caption)]})

    extract("red")
    do(job(tmp_path / "in", tmp_path / "out"))
    extract("blue")
    with pytest.raises(DataError, match="the first is c, which changed; packs are never rewritten"):
        compact.plan(job(tmp_path / "in", tmp_path / "out"))


def test_a_source_of_another_model_is_told_of(tmp_path):
    write_images(tmp_path / "in/256px", {"u": [("a", "1.00")]}, model={"model": "one"})
    do(job(tmp_path / "in", tmp_path / "out"))
    shutil.rmtree(tmp_path / "in")
    write_images(tmp_path / "in/256px", {"u": [("a", "1.00")]}, model={"model": "two"})
    with pytest.raises(DataError, match=r"model\.model was 'one' when it was compacted, and is 'two'; .* new folder"):
        compact.plan(job(tmp_path / "in", tmp_path / "out"))


def test_what_a_codec_was_calibrated_to_comes_along(tmp_path):
    root = tmp_path / "in" / "text"
    write_texts(root, {"u": [("a", "red"), ("b", "a long caption")]}, calibration=[1, 2, 3, 4])
    do(job(tmp_path / "in", tmp_path / "out"))
    assert contents(tmp_path / "out/text") == contents(root)
    assert (tmp_path / "out/text/codec-1234.safetensors").read_bytes() == (root / "codec-1234.safetensors").read_bytes()
    assert whole(tmp_path / "out")
    (root / "codec-1234.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"codec-1234\.safetensors: missing or damaged"):
        do(job(tmp_path / "in", tmp_path / "other"))


def test_the_image_set_to_follow_can_be_chosen(tmp_path):
    write_images(tmp_path / "in/256px", {"u": [(f"{i}", RATIOS[i % 3]) for i in range(9)]})
    write_images(tmp_path / "in/512px", {"u": [(f"{i}", RATIOS[-i % 3]) for i in range(9)]})
    write_texts(tmp_path / "in/text", {"u": [(f"{i}", f"caption {i}") for i in range(9)]})
    for name in ("256px", "512px"):
        do(job(tmp_path / "in", tmp_path / name, image_set=name))
        images, texts = (Original(tmp_path / name / some) for some in (name, "text"))
        assert images.entries["key"].tolist() == texts.entries["key"].tolist()
    with pytest.raises(ConfigError, match="image_set: expected an image set of .* found 'text'"):
        compact.plan(job(tmp_path / "in", tmp_path / "out", image_set="text"))


def test_one_set_can_be_compacted_alone_but_not_onto_itself(source, tmp_path):
    do(job(source / "text", tmp_path / "out"))
    assert contents(tmp_path / "out/text") == contents(source / "text")
    with pytest.raises(ConfigError, match="output: expected another folder than the dataset's own"):
        compact.plan(job(source, source))
    write_texts(tmp_path / "other/text", {"u": [("a", "red")]})
    with pytest.raises(ConfigError, match="other/text: expected a new folder, .* a feature set of another command"):
        compact.plan(job(source / "text", tmp_path / "other"))
    with pytest.raises(DataError, match="expected a dataset, found no finished feature set; run `pixart extract`"):
        compact.plan(job(tmp_path, tmp_path / "more"))


def test_a_dry_run_writes_nothing(source, tmp_path):
    plans = compact.plan(job(source, tmp_path / "out"))
    assert all(plan.todo and not plan.done for _, plan in plans)
    assert not (tmp_path / "out").exists()
    assert main(["compact", str(source), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


def flip_a_byte(root, key):
    original = Original(root)
    [record] = original.entries[original.entries["key"] == key_hash(key)]
    path = root / original.manifest.shards[record["shard"]]["path"]
    data = bytearray(path.read_bytes())
    data[int(record["offset"])] ^= 1
    path.write_bytes(data)
    return path, int(record["offset"])


@pytest.mark.usefixtures("ray_here")
def test_on_ray_a_damaged_sample_is_named_and_the_other_packs_are_done(source, tmp_path, capsys):
    source = shutil.copytree(source, tmp_path / "source")
    path, offset = flip_a_byte(source / "256px", "s/025")
    compaction = job(source, tmp_path / "out", cluster=ONE_WORKER)
    with pytest.raises(DataError, match="sample s/025: damaged or missing: .*; the other packs are done"):
        compact.run(compaction)
    [(run, _), _] = compact.prepare(compaction, write=False)
    assert len(make_plan(run).todo) == 1 < len(run.units)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    accounts = [account for _, account in compact.run(compaction)]
    assert [(a.rows_in, a.rows_out, a.rejected) for a in accounts] == [
        (61, 60, {"truncated_image": 1}),
        (66, 57, {"no_caption": 9}),
    ]
    do(job(source, tmp_path / "direct"))
    made = {path for path in files(tmp_path / "out") if not path.endswith(("job.toml", "status.json", "summary.html"))}
    assert made == files(tmp_path / "direct").keys()
    assert all((tmp_path / "out" / path).read_bytes() == data for path, data in files(tmp_path / "direct").items())


def test_object_stores_are_read_and_written(source, tmp_path, bucket):
    do(job(source, f"{bucket}/one", shard_bytes=1 << 20))
    do(job(f"{bucket}/one", tmp_path / "out", shard_bytes=1 << 20))
    for name in ("256px", "text"):
        assert contents(location(f"{bucket}/one") / name) == contents(source / name)
        assert contents(tmp_path / "out" / name) == contents(source / name)
        again = [Original(root / name).manifest.shards for root in (location(f"{bucket}/one"), tmp_path / "out")]
        assert again[0] == again[1]
    assert whole(tmp_path / "out")
