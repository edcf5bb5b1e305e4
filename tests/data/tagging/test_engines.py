"""Which engine is taken: the compiled one only where it is sure to agree with NLTK; else NLTK, with a word of why."""

import logging
import shutil

import numpy as np
import pyarrow as pa
import pytest

from pixart_data.errors import ConfigError, DataError
from pixart_data.tagging import engines, resources
from pixart_data.tagging.blocks import TAGS
from pixart_data.tagging.compiled import CompiledEngine
from pixart_data.tagging.engines import open_engine
from pixart_data.tagging.references import NltkEngine, TextBlobEngine
from pixart_data.tagging.resources import ORTHO_CONTEXT, WEIGHTS

CAPTIONS = ["Two dogs chase a red ball. It's raining!", None, "Dr. Smith's café in St. Paul", ""]


def read(engine):
    block = engine.tag(pa.array(CAPTIONS))
    words = engine.vocabulary.surfaces(block.words).to_pylist()
    return [*zip(words, (TAGS[tag] for tag in block.tags), block.begins, strict=True)], block.counted.tolist()


def expected():
    return read(NltkEngine())


@pytest.fixture
def warnings(caplog):
    """What `open_engine` warned of."""
    caplog.set_level(logging.INFO, logger="pixart_data.tagging.engines")
    return lambda: [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def forgetful_nltk():
    """NLTK keeps what it loaded; before and after a test that damages files it must not."""
    import nltk.tag
    import nltk.tokenize

    def forget():
        nltk.tag._get_tagger.cache_clear()
        nltk.tokenize._get_punkt_tokenizer.cache_clear()

    forget()
    yield
    forget()


def test_known_data_and_version_are_compiled(nltk_data, warnings, caplog):
    engine = open_engine("nltk")
    assert isinstance(engine, CompiledEngine)
    assert engine.name == NltkEngine().name
    assert not engine.approximate
    assert read(engine) == expected()
    assert warnings() == []
    assert "compiled; agreed on 2" in caplog.text


def test_another_version_is_tagged_by_nltk_itself(synthetic_nltk_data, warnings, monkeypatch):
    monkeypatch.setattr(engines, "NLTK_VERSIONS", frozenset({"1.2.3"}))
    engine = open_engine("nltk")
    assert isinstance(engine, NltkEngine)
    assert read(engine) == expected()
    (warning,) = warnings()
    assert "expected nltk 1.2.3, found " in warning
    assert "pip install nltk==1.2.3" in warning
    assert "NLTK itself tags the captions" in warning


def test_other_data_files_are_tagged_by_nltk_itself(synthetic_nltk_data, warnings, monkeypatch):
    monkeypatch.setitem(resources.DIGESTS, ORTHO_CONTEXT, "0" * 64)
    engine = open_engine("nltk")
    assert isinstance(engine, NltkEngine)
    assert read(engine) == expected()
    (warning,) = warnings()
    assert f"found others by their SHA-256: {ORTHO_CONTEXT}; " in warning


@pytest.mark.parametrize("part", ["words", "tags", "begins", "counted"])
def test_an_engine_that_differs_is_not_taken(synthetic_nltk_data, warnings, monkeypatch, part):
    class Wrong(CompiledEngine):
        def tag(self, captions):
            block = super().tag(captions)
            values = getattr(block, part)
            values[-7] = ~values[-7] if part == "counted" else not values[-7]
            return block

    monkeypatch.setattr(engines, "CompiledEngine", Wrong)
    engine = open_engine("nltk")
    assert type(engine) is NltkEngine
    assert read(engine) == expected()
    (warning,) = warnings()
    assert "found 1 that differ" in warning
    assert "please report this line" in warning


def test_weights_that_only_nltk_can_use_are_left_to_it(grammar, monkeypatch, tmp_path, forgetful_nltk, warnings):
    folder = tmp_path / "fine"
    shutil.copytree(grammar, folder)
    text = (folder / WEIGHTS).read_text()
    (folder / WEIGHTS).write_text(text.replace("0.3", "0.30001", 1))
    monkeypatch.setattr("nltk.data.path", [str(folder)])
    sums = {name: resources.digest(name, (folder / name).read_bytes()) for name in resources.DIGESTS}
    monkeypatch.setattr(resources, "DIGESTS", sums)
    engine = open_engine("nltk")
    assert isinstance(engine, NltkEngine)
    assert read(engine) == expected()
    (warning,) = warnings()
    assert "expected weights of three decimals" in warning


@pytest.mark.parametrize("content", [b"", b"{", b'{"bias": 3}'])
def test_damaged_data_is_an_error(grammar, monkeypatch, tmp_path, forgetful_nltk, content):
    folder = tmp_path / "damaged"
    shutil.copytree(grammar, folder)
    (folder / WEIGHTS).write_bytes(content)
    monkeypatch.setattr("nltk.data.path", [str(folder)])
    with pytest.raises(DataError, match=r"found them damaged \(.*delete .*--download-nltk"):
        open_engine("nltk")


def test_missing_data_is_an_error_and_no_approximation(monkeypatch, tmp_path):
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"7 of 7 missing(.|\n)*--approximate"):
        open_engine("nltk")


def test_the_lexicon_needs_no_data(monkeypatch, tmp_path):
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    engine = open_engine("textblob")
    assert isinstance(engine, TextBlobEngine)
    assert engine.approximate
    assert np.count_nonzero(engine.tag(pa.array(CAPTIONS)).counted) == 2
