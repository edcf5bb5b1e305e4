"""Which engine is taken: the compiled one only where it is sure to agree with NLTK; else NLTK, with a word of why."""

import logging
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from nltk import redos
from nltk.tokenize import word_tokenize
from numba import config

from pixart_data.errors import ConfigError, DataError
from pixart_data.tagging import compilation, engines, resources
from pixart_data.tagging.blocks import TAGS
from pixart_data.tagging.compiled import CompiledEngine
from pixart_data.tagging.engines import open_engine
from pixart_data.tagging.references import NltkEngine, TextBlobEngine
from pixart_data.tagging.resources import ORTHO_CONTEXT, WEIGHTS, find_resources
from pixart_data.tagging.sentences import PairTable, pair_key, patiently
from pixart_data.tagging.tokenizer import Tokenizer
from pixart_data.tagging.vocabulary import Vocabulary

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
    path = find_resources().places[ORTHO_CONTEXT]
    assert f"found others by their SHA-256: {path}; delete just these and run `pixart stats --download-nltk`" in warning


def test_without_compiled_code_nltk_itself_tags(synthetic_nltk_data, warnings, monkeypatch):
    monkeypatch.setattr(config, "DISABLE_JIT", 1)
    engine = open_engine("nltk")
    assert isinstance(engine, NltkEngine)
    (warning,) = warnings()
    assert "found NUMBA_DISABLE_JIT set; unset it" in warning


def test_compiling_in_each_process_is_said(synthetic_nltk_data, warnings, monkeypatch):
    monkeypatch.setattr(compilation, "folder", lambda: None)
    assert isinstance(open_engine("nltk"), CompiledEngine)
    (warning,) = warnings()
    assert "each process compiles for a minute; set NUMBA_CACHE_DIR" in warning


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
    sums = {name: resources.digest(name, (grammar / name).read_bytes()) for name in resources.DIGESTS}
    monkeypatch.setattr(resources, "DIGESTS", sums)
    remedy = rf"found them damaged \(.*\); delete just {re.escape(str(folder / WEIGHTS))} and run .*--download-nltk"
    with pytest.raises(DataError, match=remedy):
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


def test_a_caption_on_which_nltk_gives_up_gets_its_answer(synthetic_nltk_data, monkeypatch):
    caption = 'He said\t"no". It\'s over.'
    words = Vocabulary()
    tokenizer = Tokenizer(words)
    split = tokenizer._split

    def hurried(sentence):
        if redos.DEFAULT_TIMEOUT == 5.0:
            raise TimeoutError
        return split(sentence)

    monkeypatch.setattr(tokenizer, "_split", hurried)
    tokens = tokenizer.tokenize(pa.array([caption]))
    assert tokenizer.num_declined == 1
    assert words.surfaces(tokens.words).to_pylist() == word_tokenize(caption)
    assert tokens.begins.tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert redos.DEFAULT_TIMEOUT == 5.0


def test_a_pair_on_which_nltk_gives_up_gets_its_answer():
    def ends(text):
        if redos.DEFAULT_TIMEOUT == 5.0:
            raise TimeoutError
        return text == "No. The"

    pairs = PairTable(ends)
    key = pair_key(0, 1)
    pairs.learn(np.array([key], np.uint64), ["No.", "The"].__getitem__)
    assert dict(zip(pairs.pairs.keys, pairs.pairs.answers, strict=True))[key] == 1


def test_a_caption_that_takes_nltk_minutes_is_named():
    def ask(text):
        raise TimeoutError

    with pytest.raises(
        DataError, match=r"one of 1,000 characters that takes longer, '(aé){40}'\.\.\.; shorten it"
    ) as caught:
        patiently(ask, "aé" * 500)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert redos.DEFAULT_TIMEOUT == 5.0
