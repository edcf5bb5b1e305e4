"""A cut of `make fuzz`, and that it would notice a difference."""

import dataclasses

import numpy as np
import pytest

from tests import fuzz


@pytest.fixture
def trial(nltk_data):
    return fuzz.Trial()


def test_hostile_captions_are_tagged_as_nltk_tags_them(trial):
    problems = []
    for seed in range(4):
        batch = fuzz.captions(seed)
        problems += [trial.explained(seed, batch, number) for number in trial.differing(batch)]
    assert problems == []
    tokenizer = trial.engine.tokenizer
    assert tokenizer.num_captions > 1900
    assert tokenizer.num_declined < 0.5 * tokenizer.num_captions  # it was not NLTK against itself


def test_captions_of_a_seed_are_always_the_same():
    assert fuzz.captions(3) == fuzz.captions(3) != fuzz.captions(4)


class Wrong:
    """An engine that takes one word for something else."""

    def __init__(self, engine):
        self.tokenizer, self.vocabulary, self._engine = engine.tokenizer, engine.vocabulary, engine

    def tag(self, captions):
        block = self._engine.tag(captions)
        tags = np.where(block.words == self.vocabulary.intern("zebra"), 0, block.tags)
        return dataclasses.replace(block, tags=tags.astype(np.uint8))


def test_a_difference_is_found_and_cut_down(trial):
    trial.engine = Wrong(trial.engine)
    batch = ["A dog.", None, "Two dogs chase (one) zebra near the lake, it's said.", "A cat."]
    assert trial.differing(batch) == [2]
    assert trial.explained(7, batch, 2) == "seed 7, caption 2: 'zebra'"
