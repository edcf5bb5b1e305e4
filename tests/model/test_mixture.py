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
from pixart_model.dataset import open_dataset
from pixart_model.train import run
from tests.model.conftest import change_manifest, write_text_set

MIX = {"text": 0.6, "short": 0.3, "raw": 0.1}


@pytest.fixture(scope="module")
def texts(features, tmp_path_factory):
    """The features of all the tests, with texts `short` of every third sample and `raw` of the two that lack others.

    And what is to be read of them, by set and key; `short` is stored by another codec.
    """
    root = tmp_path_factory.mktemp("mixed") / "features"
    shutil.copytree(features, root)
    shutil.rmtree(root / "text")
    keys = [f"source/{i:03d}" for i in range(25)]
    return root, {
        "text": write_text_set(root / "text", [*reversed(keys[:23]), "source/orphan"], np.random.default_rng(0)),
        "short": write_text_set(root / "short", keys[::3], np.random.default_rng(1), "int8"),
        "raw": write_text_set(root / "raw", [*keys[20:], "source/stranger"], np.random.default_rng(2)),
    }


@pytest.fixture
def mixed(texts):
    return texts[0]


@pytest.fixture
def opened(mixed):
    """Opens the mixture, and closes it in the end."""
    datasets = []

    def open_(seed=0, **data):
        datasets.append(open_dataset(Data(features=str(mixed), **{"text_mix": MIX, "batch_size": 4, **data}), seed))
        return datasets[-1]

    yield open_
    for dataset in datasets:
        dataset.close()


def drawn(dataset, known, num_batches):
    """Which set each sample's text came from, told by its content: of each key, the draws of its epochs in order."""
    names = {}
    for host in itertools.islice(dataset.batches(), num_batches):
        batch = host.to(torch.device("cpu"))
        for key, text, mask in zip(batch.keys, batch.text, batch.mask, strict=True):
            found = [n for n, texts in known.items() if key in texts and torch.equal(texts[key], text[mask])]
            names.setdefault(key, []).extend(found)
            assert len(found) == 1
            assert not text[~mask].any()
    return names


def test_a_sample_is_there_if_any_set_has_its_text(opened):
    counts = opened().facts()["counts"]
    assert (counts["samples"], counts["without_text"]) == (25, 0)
    assert (counts["texts"], counts["texts_without_image"]) == ([5, 9, 23], [1, 0, 1])


def test_texts_come_from_the_sets_that_have_them_as_the_weights_say(opened, texts):
    root, known = texts
    names = drawn(opened(), known, 400)
    assert len(names) == 25
    assert all(key in known[name] for key, found in names.items() for name in found)
    both = [key for key in known["text"].keys() & known["short"].keys() - known["raw"].keys() if key in names]
    shares = [name == "text" for key in both for name in names[key]]
    assert len(shares) > 300
    assert np.mean(shares) == pytest.approx(0.6 / 0.9, abs=0.08)  # three standard errors
    assert set(names["source/023"]) == {"raw"}
    assert set(names["source/001"]) == {"text"}
    assert set(names["source/021"]) == {"text", "short", "raw"}


def test_draws_depend_on_seed_epoch_and_key_alone(opened, texts):
    names = drawn(opened(), texts[1], 90)
    assert drawn(opened(), texts[1], 90) == names
    assert drawn(opened(seed=1), texts[1], 90) != names
    assert len({tuple(found[:8]) for found in names.values()}) > 6
    turned = {name: 10 * weight for name, weight in reversed(MIX.items())}
    other = drawn(opened(text_mix=turned, batch_size=7, num_threads=1), texts[1], 50)
    assert {key: found[:8] for key, found in other.items()} == {key: found[:8] for key, found in names.items()}


def test_any_position_continues_the_same_texts(opened):
    dataset = opened(seed=5)
    for number, batch in zip(range(2, 9), dataset.batches(2), strict=False):
        again = dataset.read(number).to(torch.device("cpu"))
        assert torch.equal(again.text, batch.to(torch.device("cpu")).text)


def test_a_mix_of_one_set_is_that_set(opened):
    alone, mix = opened(text_mix={}, text_set="text"), opened(text_mix={"text": 3})
    assert alone.facts() == mix.facts()
    cpu = torch.device("cpu")
    assert all(torch.equal(alone.read(i).to(cpu).text, mix.read(i).to(cpu).text) for i in range(9))


def test_packed_captions_of_several_sets_are_in_the_order_of_the_samples(opened):
    dataset, cpu = opened(), torch.device("cpu")
    several = 0
    for number in range(12):
        batch = dataset.read(number)
        several += len(batch.texts) > 1
        packed, padded = batch.to(cpu, packed=True), batch.to(cpu)
        assert torch.equal(packed.text, padded.text[padded.mask])
        assert packed.offsets.diff().tolist() == batch.lengths.tolist() == padded.mask.sum(1).tolist()
    assert several > 3


def test_a_mix_is_told_of(mixed, opened, caplog):
    with caplog.at_level(logging.INFO):
        facts = opened().facts()
    assert (
        "texts are drawn from raw 10% (of 5 samples), short 30% (of 9 samples), text 60% (of 23 samples)" in caplog.text
    )
    assert facts["text_mix"]["short"] == {"share": pytest.approx(0.3), "samples": 9}
    assert facts["text"]["index_sha256"] == FeatureSet(mixed / "text").manifest.index_sha256
    assert json.loads(json.dumps(facts)) == facts


def test_sets_of_different_encoders_do_not_mix(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "copy")
    change_manifest(tmp_path / "copy/short", lambda fields: fields["model"].update(revision="another"))
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
    data = {"features": str(mixed), "text_mix": {"text": 0.5, "short": 0.4, "raw": 0.1}}
    with pytest.raises(ConfigError, match=r"data.text_mix: this job has \{.*'text': 0.5\}, the run in .* has .*0.6"):
        run(make_job(data=data, run={"output": str(tmp_path / "whole"), "num_steps": 10}))
    data = {"features": str(mixed), "text_mix": {"text": 0.5, "short": 0.5}}
    with pytest.raises(
        ConfigError, match=r"data.text_set: this job has short \(.*\), text \(.*\), the run in .* has raw"
    ):
        run(make_job(data=data, run={"output": str(tmp_path / "whole"), "num_steps": 10}))
