import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data.tagging.vocabulary import Vocabulary, hash_of


def test_a_word_has_one_number_and_comes_back_as_it_was():
    vocabulary = Vocabulary()
    words = ["Dog", "dog", "Café", "", "\x00a", "\U0001f600", "x" * 300]
    assert [vocabulary.intern(word) for word in [*words, *words]] == [*range(7), *range(7)]
    assert [vocabulary.surface(number) for number in range(7)] == words
    assert vocabulary.surfaces().to_pylist() == words
    assert vocabulary.surfaces(np.array([2, 0])).to_pylist() == ["Café", "Dog"]
    assert len(vocabulary) == 7


def test_it_grows_and_numbers_stay():
    vocabulary = Vocabulary()
    words = [f"word-{number}" for number in range(40_000)]
    first = [vocabulary.intern(word) for word in words]
    assert first == list(range(40_000))
    assert [vocabulary.intern(word) for word in words] == first
    assert vocabulary.surfaces().to_pylist() == words
    assert vocabulary.size_bytes < 6_000_000


def test_words_whose_hashes_collide_in_the_table_are_told_apart(monkeypatch):
    monkeypatch.setattr("pixart_data.tagging.vocabulary._FEWEST_WORDS", 2)
    monkeypatch.setattr("pixart_data.tagging.vocabulary._FEWEST_BYTES", 1)
    vocabulary = Vocabulary()
    words = [chr(97 + number % 26) * (1 + number // 26) for number in range(200)]
    assert [vocabulary.intern(word) for word in words] == list(range(200))
    assert [vocabulary.surface(number) for number in range(200)] == words


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=6), max_size=20))
def test_folded_hashes_are_equal_where_lower_case_is(words):
    vocabulary = Vocabulary()
    numbers = []
    for word in words:
        numbers.append(vocabulary.intern(word))
        folded = vocabulary.folded()
    for number, word in zip(numbers, words, strict=True):
        assert folded[number] == hash_of(word.lower())
    assert len({hash_of(word.lower()) for word in words}) == len({word.lower() for word in words})


@pytest.mark.parametrize("word", ["a\ud800b"])
def test_a_lone_surrogate_becomes_the_replacement_character(word):
    vocabulary = Vocabulary()
    assert vocabulary.surface(vocabulary.intern(word)) == "a�b"
