"""Proposals against brute force, and losses against what `buckets` does with every single image."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data.buckets import bucket_table, custom_table, nearest_bucket, place, size_name
from pixart_data.errors import ConfigError
from pixart_data.proposals import candidates, losses, propose
from pixart_data.sizes import Sizes

CHOICES = candidates(256, 32, 0.9, 4.0)
SIDES = st.integers(40, 4000)


def sizes_of(*triples):
    width_px, height_px, count = np.array(triples, dtype=np.int64).T
    return Sizes(width_px, height_px, count)


def random_sizes(seed, num_sizes=300):
    generator = np.random.default_rng(seed)
    width_px = generator.integers(100, 3000, num_sizes)
    height_px = np.maximum(1, (width_px * np.exp(generator.normal(0.1, 0.5, num_sizes))).astype(np.int64))
    return Sizes(width_px, height_px, generator.integers(1, 50, num_sizes))


def expanded(sizes):
    for width, height, count in zip(sizes.width_px, sizes.height_px, sizes.count, strict=True):
        yield int(width), int(height), int(count)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("resolution_px", [256, 1024])
def test_losses_are_those_of_every_image_in_its_nearest_bucket(seed, resolution_px):
    sizes, table = random_sizes(seed), bucket_table(resolution_px)
    counts = dict.fromkeys((bucket.ratio for bucket in table), 0)
    crops, enlarged = [], 0
    for width_px, height_px, count in expanded(sizes):
        bucket = nearest_bucket(width_px, height_px, table)
        placed = place(width_px, height_px, bucket)
        kept = bucket.width_px * bucket.height_px / (placed.resized_width_px * placed.resized_height_px)
        crops += [1 - kept] * count
        counts[bucket.ratio] += count
        enlarged += count * (placed.resized_width_px > width_px or placed.resized_height_px > height_px)
    found = losses(sizes, table, batch_size=16, num_gpus=4)
    assert found.counts == tuple(counts.values())
    assert found.cropped == pytest.approx(np.mean(crops), abs=2 / resolution_px)  # the resize rounds to whole pixels
    assert found.worst == pytest.approx(np.quantile(crops, 0.99, method="inverted_cdf"), abs=4 / resolution_px)
    assert found.enlarged == enlarged / sizes.num_images
    rare = [count for count in counts.values() if count < 64]
    assert rare
    assert found.rare == sum(rare) / sizes.num_images
    assert found.carried == sum(count % 16 for count in counts.values()) / sizes.num_images
    assert found.num_used == sum(count > 0 for count in counts.values())


@pytest.mark.parametrize("num_gpus", [1, 2, 3])
def test_waiting_is_that_of_all_draws_of_canvases(num_gpus):
    table = custom_table(["256x256", "192x336", "288x208"], 256)
    sizes = sizes_of((256, 256, 5), (336, 192, 2), (208, 288, 3))
    found = losses(sizes, table, 4, num_gpus)
    areas = {size_name(b): b.height_px * b.width_px for b in table}
    shares = dict(zip((size_name(b) for b in table), (count / 10 for count in found.counts), strict=True))
    assert shares == {"192x336": 0.2, "256x256": 0.5, "288x208": 0.3}
    draws = itertools.product(shares, repeat=num_gpus)
    largest = sum(math.prod(shares[n] for n in draw) * max(areas[n] for n in draw) for draw in draws)
    mean = sum(shares[n] * areas[n] for n in shares)
    assert found.waiting == pytest.approx(1 - mean / largest, abs=1e-12)
    assert (found.waiting > 0.01) == (num_gpus > 1)
    assert found.total == found.cropped + found.waiting


@pytest.mark.parametrize(
    ("resolution_px", "multiple_px", "min_area", "max_aspect"),
    [(256, 16, 0.9, 4.0), (512, 32, 0.95, 2.0), (1024, 16, 0.9, 4.0), (256, 16, 0.9, 1.0)],
)
def test_candidates_are_all_canvases_in_bounds(resolution_px, multiple_px, min_area, max_aspect):
    choices = candidates(resolution_px, multiple_px, min_area, max_aspect)
    found = {(b.height_px, b.width_px) for b in choices}
    sides = range(multiple_px, 4 * resolution_px + 1, multiple_px)
    allowed = {
        (height, width)
        for height, width in itertools.product(sides, sides)
        if min_area * resolution_px**2 <= height * width <= resolution_px**2
        and max(height, width) <= max_aspect * min(height, width)
    }
    assert found <= allowed
    assert (resolution_px, resolution_px) in found
    ratios = [b.height_px / b.width_px for b in choices]
    assert ratios == sorted(set(ratios))  # of one ratio only the largest
    for height, width in allowed - found:
        assert any(h * width == w * height and h > height for h, w in found)
    assert {(width, height) for height, width in found} == found


@pytest.mark.parametrize("multiple_px", [24, 48, 512])
def test_sides_that_the_model_cannot_take_are_refused(multiple_px):
    with pytest.raises(
        ConfigError, match=f"multiple_px: expected a multiple of 16 that divides 256, found {multiple_px}"
    ):
        candidates(256, multiple_px, 0.9, 4.0)


def cost(sizes, table, waits):
    """The objective, image by image."""
    largest = max(b.height_px * b.width_px for b in CHOICES)
    total = 0.0
    for width_px, height_px, count in expanded(sizes):
        b = nearest_bucket(width_px, height_px, table)
        apart = abs(math.log(height_px / width_px) - math.log(b.height_px / b.width_px))
        total += count * (1 - math.exp(-apart) + waits * (1 - b.height_px * b.width_px / largest))
    return total


def least_cost(sizes, number, waits, min_images):
    """The best of all tables of a number of canvases; None if there is none."""
    costs = [
        cost(sizes, table, waits)
        for table in itertools.combinations(CHOICES, number)
        if len({b.ratio for b in table}) == number and min(losses(sizes, table, 1, 1).counts) >= min_images
    ]
    return min(costs, default=None)


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.tuples(SIDES, SIDES, st.integers(1, 9)), min_size=1, max_size=12),
    num_gpus=st.sampled_from([1, 8]),
    min_images=st.integers(0, 12),
)
def test_no_other_table_loses_less(images, num_gpus, min_images):
    sizes = sizes_of(*images)
    tables = propose(sizes, CHOICES, 4, num_gpus, min_images)
    for number in range(1, 5):
        least = least_cost(sizes, number, num_gpus > 1, min_images)
        assert (number in tables) == (least is not None)
        if least is not None:
            assert len(tables[number]) == number
            assert min(losses(sizes, tables[number], 1, 1).counts) >= min_images
            assert cost(sizes, tables[number], num_gpus > 1) == pytest.approx(least, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("resolution_px", [512, 1024])
def test_tables_can_be_used_whatever_their_number_of_canvases(resolution_px):
    choices = candidates(resolution_px, 16, 0.9, 4.0)
    assert len({b.ratio for b in choices}) < len(choices)  # some share a name
    sizes = random_sizes(7)
    tables = propose(sizes, choices, 40, 8, 64)
    assert {1, 8, 16} <= set(tables)
    for table in tables.values():
        assert custom_table([size_name(b) for b in table], resolution_px) == table
        assert min(losses(sizes, table, 16, 4).counts) >= 64
    unlimited = propose(sizes, choices, 40, 8, 0)
    assert set(unlimited) == set(range(1, 41))


def test_no_two_canvases_share_a_folder_even_where_that_would_crop_nothing():
    choices = candidates(1024, 16, 0.9, 4.0)
    one, other = next(pair for pair in itertools.pairwise(choices) if pair[0].ratio == pair[1].ratio)
    sizes = sizes_of(*((b.width_px, b.height_px, 100) for b in (one, other)))
    table = propose(sizes, choices, 2, 1, 0)[2]
    assert table[0].ratio != table[1].ratio
    assert 0 < losses(sizes, table, 16, 1).cropped < 0.01


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_the_references_table_is_never_better_than_as_many_of_its_own_kind(num_gpus):
    sizes, reference = random_sizes(3, 2000), bucket_table(512)
    choices = candidates(512, 32, 0.9, 4.0)
    assert {size_name(b) for b in reference} <= {size_name(b) for b in choices}
    [table] = [propose(sizes, choices, 40, num_gpus, 0)[40]]
    largest = 512 * 512

    def objective(table):
        found = losses(sizes, table, 16, num_gpus)
        areas = np.array([b.height_px * b.width_px for b in table])
        return found.cropped + (num_gpus > 1) * float((1 - areas / largest) @ found.counts) / sizes.num_images

    assert objective(table) <= objective(reference)


def test_a_proposal_depends_on_nothing_but_the_sizes():
    sizes = random_sizes(5)
    order = np.random.default_rng(0).permutation(len(sizes.count))
    shuffled = Sizes(sizes.width_px[order], sizes.height_px[order], sizes.count[order])
    choices = candidates(512, 16, 0.9, 4.0)
    assert propose(sizes, choices, 24, 8, 16) == propose(shuffled, choices, 24, 8, 16)


def test_with_one_gpu_nobody_waits_and_crops_decide():
    sizes = sizes_of((1600, 1000, 100))
    choices = candidates(256, 16, 0.9, 4.0)
    [nearest] = propose(sizes, choices, 1, 1, 0)[1]
    [fuller] = propose(sizes, choices, 1, 8, 0)[1]
    assert (size_name(nearest), size_name(fuller)) == ("192x320", "192x336")
