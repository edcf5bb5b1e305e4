"""`pixart verify`: its words and exit codes, the fast check, and samples computed again from their sources."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from pipelines import extract
from pipelines.config import Extract
from pixart_data import encoders
from pixart_data.commits import write_record
from pixart_data.config import digest, load, resolved_toml
from pixart_data.recomputation import choose
from pixart_data.shards import FeatureSet
from tests.corruption import build


def extract_here(job):
    """What `pixart extract` does, without Ray."""
    for run, finish in extract._runs(job):
        run.root.mkdir(parents=True)
        (run.root / "job.toml").write_text(f"# pixart extract\n{resolved_toml(job)}")
        stage = run.build()
        records = []
        for unit in run.units:
            decided = run.settings(unit)
            records.append(replace(stage(unit, lambda *_: None), settings=decided, digest=digest(decided)))
            write_record(run.root, records[-1])
        finish(records)


@pytest.fixture(scope="module")
def world(tmp_path_factory, pictures, miniatures):
    """Pictures, a table of captions, models, and a dataset of images with flips and texts of two codecs."""
    root = tmp_path_factory.mktemp("world")
    names = [path.stem for path in sorted(pictures.glob("*.jpg"))][:6]
    shutil.copytree(pictures, root / "pictures", ignore=lambda _, all: [n for n in all if n.split(".")[0] not in names])
    source = {"paths": [str(root / "pictures")], "rows_per_unit": 4}
    text = {"model": miniatures["t5"], "max_tokens": 30}
    # One at a time: an image's last bits depend on what is beside it in its batch.
    image = {"model": miniatures["vae"], "batch_size": 1, "flips": True}
    out = {"output": str(root / "features")}
    extract_here(Extract.model_validate({**out, "source": source, "image": image, "text": text}))
    rows = pq.read_table(root / "features/256px/index.parquet", columns=["key"])["key"].to_pylist()
    captions = [f"picture {number // 2} of {'many ' * number}" for number in range(len(rows))]
    pq.write_table(pa.table({"key": rows, "caption": captions}), root / "captions.parquet")
    table = {"path": str(root / "captions.parquet")}
    small = {**text, "set": "short", "codec": "int8"}
    extract_here(Extract.model_validate({**out, "source": source, "captions": table, "text": small}))
    return root


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the dataset; its job files name the sources of the first."""
    shutil.copytree(world / "features", tmp_path / "features")
    return tmp_path / "features"


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_all_samples_computed_again_are_what_is_stored(world, capsys):
    code, out, err = run(capsys, "verify", world / "features", "--recompute", 1000)
    assert code == 0, err
    lines = {line.split(":")[0]: line for line in out.splitlines()}
    assert lines["256px"].startswith("256px: 6 of 6 samples computed again, 6 equal bit for bit; largest difference 0,")
    assert "relative error 0 (up to 0.005 is taken for the same)" in lines["256px"]
    assert lines["text"].startswith("text: 6 of 6 samples computed again, 6 equal bit for bit; largest difference 0,")
    assert lines["short"].startswith("short: 6 of 6 samples computed again, 6 equal bit for bit")
    assert "all whole" in lines["verify"]


def test_few_samples_are_spread_over_the_buckets_and_the_same_each_time(world, capsys):
    features = FeatureSet(world / "features/256px")
    num_buckets = len(set(features.entries["bucket"].tolist()))
    assert num_buckets > 2
    chosen = choose(features, num_buckets, seed=0)
    assert len({one.row["bucket"] for one in chosen}) == num_buckets
    assert [one.row["key"] for one in choose(features, num_buckets, seed=0)] == [one.row["key"] for one in chosen]
    others = [{one.row["key"] for one in choose(features, num_buckets, seed=seed)} for seed in range(6)]
    assert len(set(map(frozenset, others))) > 1
    assert all(one.row["key"] == features.keys([one.entry["row"]])[0] for one in chosen)
    code, out, _ = run(capsys, "verify", world / "features/256px", "--fast", "--recompute", 2, "--set", "seed=3")
    assert code == 0
    assert "256px: 2 of 6 samples computed again, 2 equal" in out
    assert "run without --fast" in out


def with_noise(monkeypatch, share):
    """An encoder whose results are off by this share, as on other hardware, or of another model."""
    whole = encoders.ImageEncoder.__call__

    def off(self, batch):
        done = whole(self, batch)
        noise = np.random.default_rng(0).standard_normal(done["moments"].shape)
        return done | {"moments": (done["moments"] * (1 + share * noise)).astype(np.float16)}

    monkeypatch.setattr(encoders.ImageEncoder, "__call__", off)


def test_what_other_hardware_rounds_otherwise_is_taken_for_the_same(world, capsys, monkeypatch):
    with_noise(monkeypatch, 1e-3)
    code, out, _ = run(capsys, "verify", world / "features/256px", "--recompute", 5)
    assert code == 0
    assert "256px: 5 of 6 samples computed again, 0 equal bit for bit" in out


def test_samples_that_come_out_otherwise_are_named(world, capsys, monkeypatch):
    with_noise(monkeypatch, 0.1)
    code, out, err = run(capsys, "verify", world / "features/256px", "--recompute", 5)
    assert code == 3
    assert out.count("computed again, its relative error is 0.") == 5
    assert "sample pictures/" in err
    assert "above 0.005; 5 sample(s) in all are not what they were made from" in err


def test_the_mirrored_images_are_compared_too(world, capsys, monkeypatch):
    whole = encoders.ImageEncoder.__call__
    calls = []

    def off(self, batch):
        calls.append(len(batch["pixels"]))
        done = whole(self, batch)
        return done if len(calls) % 2 else done | {"moments": done["moments"][..., ::-1]}  # every second call: mirrored

    monkeypatch.setattr(encoders.ImageEncoder, "__call__", off)
    code, out, _ = run(capsys, "verify", world / "features/256px", "--recompute", 3)
    assert code == 3
    assert out.count("computed again, its relative error") == 3


def test_features_of_texts_that_come_out_otherwise_are_named(copy, capsys, monkeypatch):
    whole = encoders.TextEncoder.encode
    monkeypatch.setattr(encoders.TextEncoder, "encode", lambda self, texts: [f * 1.2 for f in whole(self, texts)])
    for name in ("text", "short"):
        code, out, _ = run(capsys, "verify", copy / name, "--recompute", 4)
        assert code == 3
        assert out.count("computed again, its relative error is ") == 5
        assert "sample null-caption: computed again" in out


def test_a_changed_source_is_named(world, copy, capsys, tmp_path):
    """The copy's jobs are pointed to sources of their own, of which a picture and a caption then change."""
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    table = pq.read_table(world / "captions.parquet")
    for path in copy.glob("*/job.toml"):
        path.write_text(path.read_text().replace(str(world / "pictures"), str(tmp_path / "pictures")))
        path.write_text(path.read_text().replace(str(world / "captions"), str(tmp_path / "captions")))
    pq.write_table(table, tmp_path / "captions.parquet")
    picture = sorted((tmp_path / "pictures").glob("*.jpg"))[0]
    picture.write_bytes(sorted((tmp_path / "pictures").glob("*.jpg"))[1].read_bytes())
    code, out, err = run(capsys, "verify", copy / "256px", "--recompute", 12)
    assert code == 3
    assert f"its source {tmp_path}/pictures has changed since; extract again" in out
    assert out.splitlines()[-1].startswith("256px: 2 of 6 samples")
    captions = ["another caption", *table["caption"].to_pylist()[1:]]
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), tmp_path / "captions.parquet")
    code, out, err = run(capsys, "verify", copy / "short", "--recompute", 12)
    assert code == 3
    assert "has changed since" in err


def test_sources_and_models_that_are_missing_are_named(copy, capsys, tmp_path, miniatures):
    job = copy / "256px/job.toml"
    text = job.read_text()
    job.write_text(text.replace('layout = "auto"', f'layout = "auto"\nroot = "{tmp_path}"'))
    code, _, err = run(capsys, "verify", copy / "256px", "--recompute", 2)
    assert code == 2
    assert f"{job}: source.root" in err
    job.write_text(text.replace(miniatures["vae"], str(tmp_path / "no")))
    code, _, err = run(capsys, "verify", copy / "256px", "--recompute", 2)
    assert (code, f"{job}: image.model: no such folder: {tmp_path}/no" in err) == (2, True)
    shutil.copytree(miniatures["vae"], tmp_path / "vae")
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\0\0" if data[-2:] != b"\0\0" else b"\1\0"
    weights.write_bytes(data)
    job.write_text(text.replace(miniatures["vae"], str(tmp_path / "vae")))
    code, _, err = run(capsys, "verify", copy / "256px", "--recompute", 2)
    assert (code, "image.model: expected the weights folder:" in err) == (2, True)
    job.unlink()
    code, _, err = run(capsys, "verify", copy / "256px", "--recompute", 2)
    assert (code, "expected the job.toml of `pixart extract`, found none" in err) == (2, True)
    job.write_text("# pixart import\n")
    code, _, err = run(capsys, "verify", copy / "256px", "--recompute", 2)
    assert (code, "found 'import': --recompute can only do again what extract did" in err) == (2, True)


def test_a_compacted_set_is_computed_again_from_what_it_was_made_of(world, copy, capsys):
    from pipelines.config import Compact

    assert load(Compact, None, given={"path": "x", "output": "y"})
    for path in copy.glob("*/job.toml"):
        path.write_text(f'# pixart compact\npath = "{world / "features"}"\noutput = "{copy}"\n')
    code, out, _ = run(capsys, "verify", copy, "--recompute", 3)
    assert code == 0
    assert "text: 3 of 6 samples computed again, 3 equal bit for bit" in out


def test_what_is_no_feature_set_cannot_be_computed_again(tmp_path, capsys):
    from pixart_data.captions import seal_captions
    from pixart_data.commits import Record, publish_table

    file = publish_table(pa.table({"key": ["a"]}), tmp_path, tmp_path, "a")
    record = Record("a", "", {}, 1, 1, {}, [file])
    write_record(tmp_path, record)
    seal_captions(tmp_path, [record])
    code, out, err = run(capsys, "verify", tmp_path, "--recompute", 2)
    assert (code, "1 files" in out) == (2, True)
    assert f"{tmp_path}: expected a dataset or a feature set to compute again" in err


def test_a_dry_run_counts_what_the_run_then_reads(world, capsys):
    root = world / "features"
    code, out, _ = run(capsys, "verify", root, "--dry-run", "--recompute", 2)
    assert code == 0
    [first, second] = out.splitlines()
    assert second == "verify: would compute 2 samples of each set again: 256px, short, text"
    code, out, _ = run(capsys, "verify", root)
    assert out == first.replace("would read ", "").replace(f", under {root}", ", all whole\n")
    code, out, _ = run(capsys, "verify", root, "--dry-run")
    assert (code, out) == (0, f"{first}\n")


def test_no_loading_bar_is_shown(world, capsys):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        code, _, err = run(capsys, "verify", world / "features/text", "--recompute", 1)
        quiet = not logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert (code, quiet) == (0, True)
    assert "Loading" not in err


def test_the_fast_check_reads_no_shard_and_says_so(tmp_path, capsys):
    root = build(tmp_path / "d")
    shard = sorted(root.glob("256px/*/*.tar"))[0]
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[700] ^= 1
    shard.write_bytes(data)
    code, out, _ = run(capsys, "verify", root, "--fast")
    assert code == 0
    assert "the fast check found nothing wrong; it looked at sizes" in out
    assert "read no shard: run without --fast to read every byte" in out
    assert "whole" not in out
    code, out, err = run(capsys, "verify", root)
    assert code == 3
    assert f"{shard}: sample " in err
    shard.write_bytes(whole[:-512])
    code, _, err = run(capsys, "verify", root, "--fast")
    assert code == 3
    assert f"{shard}: expected {len(whole)} bytes, found {len(whole) - 512}; it is damaged; delete" in err
    shard.write_bytes(whole)
    code, out, _ = run(capsys, "verify", root, "--fast", "--dry-run")
    assert (code, "would look at the sizes of" in out) == (0, True)
    for name in ("index.parquet", "entries.bin", "manifest.json", "rejected.parquet"):
        path = root / "256px" / name
        kept = path.read_bytes()
        data = bytearray(kept)
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        assert run(capsys, "verify", root, "--fast")[0] == 3, name
        path.write_bytes(kept)
    assert run(capsys, "verify", root, "--fast")[0] == 0
