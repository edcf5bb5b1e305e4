"""The proof that an engine agrees with another: what it compares, and that nothing else passes."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pixart_data.tagging.proof import CAPTIONS, TIES, prove
from pixart_data.tagging.references import NltkEngine, TextBlobEngine


class Altered:
    """An engine that gives another's blocks, one array changed at one place."""

    def __init__(self, engine, part, place):
        self.engine, self.part, self.place = engine, part, place
        self.vocabulary, self.name, self.approximate = engine.vocabulary, engine.name, engine.approximate

    def tag(self, captions):
        block = self.engine.tag(captions)
        values = getattr(block, self.part).copy()
        values[self.place] = not values[self.place] if self.part in ("begins", "counted") else values[self.place] + 1
        return replace(block, **{self.part: values})


def test_an_engine_agrees_with_itself_whatever_its_ids(synthetic_nltk_data):
    other = NltkEngine()
    other.tag(pa.array(["words of other ids"]))
    assert prove(NltkEngine(), other) == []


@pytest.mark.parametrize(("part", "place"), [("words", 5), ("tags", 100), ("begins", -1), ("counted", 40)])
def test_any_difference_is_found_and_shown(synthetic_nltk_data, part, place):
    engine = NltkEngine()
    (line,) = prove(Altered(engine, part, place), engine)
    assert "found" in line or "counted" in line


def test_tokens_that_move_between_captions_are_found(synthetic_nltk_data):
    engine = NltkEngine()
    assert len(prove(Altered(engine, "offsets", 3), engine)) == 2


def test_the_lexicon_is_no_nltk(synthetic_nltk_data):
    assert len(prove(TextBlobEngine(), NltkEngine())) > 100


def test_its_captions_hold_what_goes_wrong():
    assert 200 < len(CAPTIONS) < 500
    assert len(set(CAPTIONS)) == len(CAPTIONS)
    text = "\n".join(CAPTIONS)
    for trap in ("\0", "“", "'", '"', "...", "\n", "U.S.", "n't", "\u2028", "😀", "\ufffd", "--", "St."):
        assert trap in text
    assert "" in CAPTIONS
    assert set(TIES) < set(CAPTIONS)
    assert sum(map(len, CAPTIONS)) < 40_000  # at every start, NLTK has to tag them too


def test_its_words_are_tagged_in_many_ways(synthetic_nltk_data):
    block = NltkEngine().tag(pa.array(CAPTIONS))
    assert len(np.unique(block.tags)) > 35
