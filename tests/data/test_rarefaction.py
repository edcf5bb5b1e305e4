"""Rarefaction: all captions give the counts, a few what all their subsets give, many what random subsets give."""

from itertools import combinations
from math import lgamma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data.errors import DataError
from pixart_data.nouns import VIEWS, Distinct, NounCounts, summarise
from pixart_data.rarefaction import expected, growth, log_factorial, log_sizes, rarefied
from tests.blocks import counted, occurrences

NOUNS = st.sampled_from([("cat", "NN"), ("Cat", "NNP"), ("cats", "NNS"), ("dog", "NN"), ("owl", "NN"), ("x1", "NNP")])
CAPTIONS = st.lists(st.lists(NOUNS, max_size=6), min_size=1, max_size=6)


def lower(surface, tag):
    return surface.lower()


def figures(captions, threshold):
    total, _ = occurrences(captions, lower)
    return len(total), sum(count > threshold for count in total.values())


@pytest.mark.parametrize("view", VIEWS)
@settings(max_examples=30)
@given(captions=CAPTIONS, threshold=st.integers(0, 5))
def test_all_captions_give_the_counts(view, captions, threshold):
    counts = counted(captions)
    stats = summarise(counts, view, threshold)
    point = rarefied(counts, len(captions), view, threshold)
    assert point.distinct_nouns == stats.distinct_nouns
    assert point.valid_nouns == stats.valid_nouns
    assert point.vn_dn == stats.vn_dn


@settings(max_examples=60)
@given(CAPTIONS, st.integers(0, 3), st.booleans())
def test_small_corpora_give_the_mean_of_all_their_subsets(captions, threshold, repeats):
    """DN always; VN too where no caption repeats a noun."""
    if not repeats:
        captions = [
            list({surface.lower(): (surface, tag) for surface, tag in caption}.values()) for caption in captions
        ]
    counts = counted(captions)
    for size in range(1, len(captions) + 1):
        subsets = [figures(subset, threshold) for subset in combinations(captions, size)]
        num_distinct, num_valid = np.mean(subsets, axis=0)
        point = rarefied(counts, size, threshold=threshold)
        assert point.distinct_nouns == pytest.approx(num_distinct, abs=1e-9)
        if not repeats:
            assert point.valid_nouns == pytest.approx(num_valid, abs=1e-9)
            assert point.vn_dn == pytest.approx(num_valid / num_distinct if num_distinct else 0, abs=1e-9)


def test_repeats_inside_a_caption_are_spread_over_its_captions():
    """Six times in two captions: in one of them the other four are by chance, as four coins are."""
    captions = [[("cat", "NN")] * 5, [("cat", "NN")], []]
    counts = counted(captions)
    for threshold, chance_of_one in ((0, 1), (1, 15 / 16), (4, 1 / 16), (5, 0)):
        point = rarefied(counts, 1, threshold=threshold)
        assert point.valid_nouns == pytest.approx(2 / 3 * chance_of_one)


def drawn(num_captions, seed, num_nouns=3000, mean_length=12):
    """A corpus of Zipf's nouns, lumpy as captions are: a third of the nouns of a caption repeats one before it."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(3, num_nouns + 3)
    lengths = rng.poisson(mean_length, num_captions)
    words = rng.choice(num_nouns, lengths.sum(), p=weights / weights.sum())
    caption_of = np.repeat(np.arange(num_captions), lengths)
    again = np.flatnonzero((rng.random(len(words)) < 1 / 3)[1:] & (caption_of[1:] == caption_of[:-1])) + 1
    for place in again:
        words[place] = words[place - 1]
    return words, caption_of


def test_larger_corpora_give_what_random_subsets_give():
    num_captions = 3000
    words, caption_of = drawn(num_captions, seed=1)
    captions = [[] for _ in range(num_captions)]
    for word, caption in zip(words.tolist(), caption_of.tolist(), strict=True):
        captions[caption].append((f"n{word}", "NN"))
    points = growth(counted(captions), sizes=[200, 500, 1000, 2000])
    rng = np.random.default_rng(2)
    for point in points:
        found = []
        for _ in range(200):
            chosen = np.zeros(num_captions, np.bool_)
            chosen[rng.permutation(num_captions)[: point.num_captions]] = True
            number = np.bincount(words[chosen[caption_of]])
            found.append((np.count_nonzero(number), np.count_nonzero(number > 10)))
        num_distinct, num_valid = np.mean(found, axis=0)
        assert point.distinct_nouns == pytest.approx(num_distinct, rel=0.005)
        assert point.valid_nouns == pytest.approx(num_valid, rel=0.03)


@settings(max_examples=30)
@given(CAPTIONS, st.integers(0, 12))
def test_figures_grow_with_the_sample(captions, threshold):
    points = growth(counted(captions), threshold=threshold, sizes=range(1, len(captions) + 1))
    for less, more in zip(points, points[1:], strict=False):
        assert less.distinct_nouns <= more.distinct_nouns + 1e-9
        assert less.valid_nouns <= more.valid_nouns + 1e-9
        assert 0 <= less.valid_nouns <= less.distinct_nouns + 1e-9


def test_sizes_are_log_spaced_and_end_with_all():
    assert log_sizes(11_200_000)[:5] == [100, 200, 500, 1000, 2000]
    assert log_sizes(11_200_000)[-3:] == [5_000_000, 10_000_000, 11_200_000]
    assert log_sizes(500) == [100, 200, 500]
    assert log_sizes(7) == [7]
    assert log_sizes(0) == []
    assert [point.num_captions for point in growth(counted([[("cat", "NN")]] * 250))] == [100, 200, 250]
    assert growth(NounCounts("t", approximate=False)) == []


@pytest.mark.parametrize("size", [0, -1, 4])
def test_sizes_beyond_the_captions_are_refused(size):
    counts = counted([[("cat", "NN")]] * 3)
    with pytest.raises(DataError, match=f"expected a size from 1 to the 3 captions counted, found {size}"):
        rarefied(counts, size)


@pytest.mark.parametrize("numbers", [range(200), [10**4, 10**6, 11_200_000, 10**10]])
def test_logarithms_of_factorials_are_those_of_the_gamma_function(numbers):
    found = log_factorial(np.array(numbers))
    assert found.tolist() == pytest.approx([lgamma(k + 1) for k in numbers], rel=1e-15, abs=1e-13)
    assert log_factorial(np.array([0, 1])).tolist() == [0, 0]


def test_millions_of_captions_keep_their_digits():
    """One noun in c of N captions: against the same probability as a product, at the paper's size."""
    size, num_captions = 1_000_000, 11_200_000
    nouns = [("once", 1), ("twice", 2), ("often", 40)]
    vocabulary = counted([[(noun, "NN") for noun, _ in nouns]])
    distinct = Distinct.of(vocabulary)
    captions = np.array([dict(nouns)[noun] for noun in distinct.nouns.to_pylist()])
    vocabulary.num_captions = num_captions
    [point] = expected(Distinct(distinct.nouns, captions, captions, "lowercase", "", vocabulary), [size])
    left = num_captions - size
    missing = [np.prod([(left - i) / (num_captions - i) for i in range(count)]) for _, count in nouns]
    assert point.distinct_nouns == pytest.approx(3 - sum(missing), rel=1e-7)
