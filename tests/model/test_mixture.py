import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from pixart_data.errors import ConfigError
from pixart_data.shards import FeatureSet
from pixart_model.config import Data
from pixart_model.dataset import Position, open_dataset
from pixart_model.train import run

MIX = {"text": 0.6, "short": 0.3, "raw": 0.1}


@pytest.fixture(scope="module")
def mixed(features, tmp_path_factory):
    """The features of all the tests, with texts `short` of every third sample and `raw` of the two that lack others."""
    from tests.model.conftest import write_text_set

    root = tmp_path_factory.mktemp("mixed") / "features"
    shutil.copytree(features, root)
    keys = [f"source/{i:03d}" for i in range(25)]
    write_text_set(root / "short", keys[::3], np.random.default_rng(1))
    write_text_set(root / "raw", [*keys[20:], "source/stranger"], np.random.default_rng(2))
    return root


@pytest.fixture
def dataset(mixed):
    opened = open_dataset(Data(features=str(mixed), text_mix=MIX, batch_size=4))
    yield opened
    opened.close()


def texts_of(root, name):
    """Every text of a set, by key, as it was written."""
    one = FeatureSet(root / name)
    rows = one.index.to_pylist()
    places = ((row["key"], row["shard"], row["offset_bytes"], row["size_bytes"], row["num_tokens"]) for row in rows)
    found = {key: one.read_tensor(shard, start, size, (n, 24)) for key, shard, start, size, n in places}
    one.close()
    return found


def drawn(dataset, root, seed, epoch):
    """Which set every sample's text of an epoch came from, told by its content."""
    known = {name: texts_of(root, name) for name in dataset.data.texts}
    names = {}
    for _, batch in itertools.islice(dataset.batches(Position(seed, epoch, 0)), dataset.num_batches):
        for key, text, mask in zip(batch.keys, batch.text, batch.mask, strict=True):
            values = text[mask].view(torch.int16).numpy().view(np.uint16)
            [names[key]] = [n for n, texts in known.items() if key in texts and np.array_equal(texts[key], values)]
            assert not text[~mask].any()
    return names


def test_a_sample_is_there_if_any_set_has_its_text(dataset):
    assert vars(dataset.counts) == {"matched": 25, "images_without_text": 0, "texts_without_image": 2}
    assert len(dataset) == 25


def test_texts_come_from_the_sets_that_have_them_as_the_weights_say(dataset, mixed):
    held = {name: texts_of(mixed, name).keys() for name in MIX}
    epochs = [drawn(dataset, mixed, 0, epoch) for epoch in range(60)]
    for names in epochs:
        assert len(names) == 25
        assert all(key in held[name] for key, name in names.items())
    both = [key for key in held["text"] & held["short"] - held["raw"] if key != "source/orphan"]
    shares = [names[key] == "text" for names in epochs for key in both]
    assert len(shares) > 300
    assert np.mean(shares) == pytest.approx(0.6 / 0.9, abs=0.08)  # three standard errors
    assert {names["source/023"] for names in epochs} == {"raw"}
    assert {names["source/001"] for names in epochs} == {"text"}
    assert {names["source/021"] for names in epochs} == {"text", "short", "raw"}


def test_draws_depend_on_seed_epoch_and_key_alone(dataset, mixed):
    first = drawn(dataset, mixed, 0, 0)
    assert drawn(dataset, mixed, 0, 0) == first
    assert len({tuple(sorted(drawn(dataset, mixed, *where).items())) for where in ((0, 0), (0, 1), (1, 0))}) == 3
    turned = {name: 10 * weight for name, weight in reversed(MIX.items())}
    other = open_dataset(Data(features=str(mixed), text_mix=turned, batch_size=7, num_threads=1))
    assert drawn(other, mixed, 0, 0) == first
    other.close()


def test_any_position_continues_the_same_texts(dataset):
    count = dataset.num_batches + 3
    stream = [batch.text for _, batch in itertools.islice(dataset.batches(Position(5, 0, 0)), count)]
    rest = dataset.batches(Position(5, 0, 2))
    for text, (_, batch) in zip(stream[2:], rest, strict=False):
        assert torch.equal(text, batch.text)


def test_a_mix_of_one_set_is_that_set(mixed):
    alone, mix = (
        open_dataset(Data(features=str(mixed), **given)) for given in ({"text_set": "text"}, {"text_mix": {"text": 3}})
    )
    assert alone.counts == mix.counts
    assert alone.facts() == mix.facts()
    rows = alone.plan(0, 0)[0]
    assert torch.equal(alone.read(rows).text, mix.read(rows, 9, 9).text)
    alone.close()
    mix.close()


def test_a_mix_is_told_of(mixed, dataset, caplog):
    with caplog.at_level(logging.INFO):
        open_dataset(Data(features=str(mixed), text_mix=MIX)).close()
    assert (
        "texts are drawn from raw 10% (of 5 samples), short 30% (of 9 samples), text 60% (of 23 samples)" in caplog.text
    )
    facts = dataset.facts()
    assert facts["text_mix"]["short"] == {"share": pytest.approx(0.3), "samples": 9}
    assert facts["text"]["index_sha256"] == FeatureSet(mixed / "text").manifest.index_sha256
    assert json.loads(json.dumps(facts)) == facts


def test_sets_of_different_encoders_do_not_mix(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "copy")
    path = tmp_path / "copy/short/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["revision"] = "another"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data.text_mix: expected sets of one encoder, found .*'def'.*'another'"):
        open_dataset(Data(features=str(tmp_path / "copy"), text_mix=MIX))


def test_a_set_that_is_not_there_is_named(mixed):
    with pytest.raises(ConfigError, match="data.text_set: no feature set dense in .*; sets there: 256px, raw, short"):
        open_dataset(Data(features=str(mixed), text_mix={"dense": 1.0, "text": 1.0}))
    with pytest.raises(ValueError, match="greater than 0"):
        Data(features="x", text_mix={"text": 0.0})


def test_a_run_that_is_continued_gives_the_weights_of_one_that_was_not(mixed, make_job, tmp_path):
    def train(name, *steps):
        for num_steps in steps:
            data = {"features": str(mixed), "text_mix": MIX}
            last = run(make_job(data=data, run={"output": str(tmp_path / name), "num_steps": num_steps}))
        return (last / "model.safetensors").read_bytes()

    assert train("whole", 9) == train("halves", 4, 9)
    data = {"features": str(mixed), "text_mix": {"text": 0.5, "short": 0.5}}
    with pytest.raises(
        ConfigError, match=r"data.text_set: this job has short \(.*\), text \(.*\), the run in .* has raw"
    ):
        run(make_job(data=data, run={"output": str(tmp_path / "whole"), "num_steps": 10}))
