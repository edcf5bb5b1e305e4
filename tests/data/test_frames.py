"""Sizes of images against what `buckets` does with every single one of them."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from pixart_data.buckets import bucket_table, nearest_bucket, place
from pixart_data.errors import ConfigError, DataError
from pixart_data.frames import FrameCounter
from pixart_data.proposals import losses
from pixart_data.sizes import Sizes

GENERATOR = np.random.default_rng(5)
WIDTHS = np.concatenate([GENERATOR.integers(16, 5000, 3000), [1, 9999, 512, 15, 16, 17]])
HEIGHTS = np.concatenate([GENERATOR.integers(16, 5000, 3000), [9999, 1, 512, 16, 15, 17]])


def counted(widths, heights, **settings):
    counter = FrameCounter(**settings)
    counter.add(widths, heights)
    return counter.to_json()


@pytest.mark.parametrize("resolution_px", [256, 512, 1024])
def test_every_image_is_placed_as_extract_places_it(resolution_px):
    table = bucket_table(resolution_px)
    counts = dict.fromkeys(table, 0)
    lost = dict.fromkeys(table, 0.0)
    upscaled = 0
    for width_px, height_px in zip(WIDTHS.tolist(), HEIGHTS.tolist(), strict=True):
        bucket = nearest_bucket(width_px, height_px, table)
        placed = place(width_px, height_px, bucket)
        counts[bucket] += 1
        resized_px = placed.resized_width_px * placed.resized_height_px
        lost[bucket] += 1 - bucket.width_px * bucket.height_px / resized_px
        upscaled += placed.resized_width_px > width_px or placed.resized_height_px > height_px
    found = counted(WIDTHS, HEIGHTS, resolution_px=resolution_px)
    assert [(b["ratio"], b["height_px"], b["width_px"]) for b in found["buckets"]] == [
        (b.ratio, b.height_px, b.width_px) for b in table
    ]
    assert [b["count"] for b in found["buckets"]] == list(counts.values())
    means = [lost[bucket] / max(count, 1) for bucket, count in counts.items()]
    assert [b["mean_crop_loss"] for b in found["buckets"]] == pytest.approx(means, abs=1e-8)
    assert found["crop_loss"]["mean"] == pytest.approx(sum(lost.values()) / len(WIDTHS), abs=1e-8)
    assert found["num_upscaled"] == upscaled == sum(b["num_upscaled"] for b in found["buckets"])
    assert 0 < found["share_upscaled"] == upscaled / len(WIDTHS) < 1


def test_figures_are_those_of_pixart_buckets():
    packed, count = np.unique(np.stack([WIDTHS, HEIGHTS]), axis=1, return_counts=True)
    expected = losses(Sizes(*packed, count), bucket_table(1024), 16, 1)
    found = counted(WIDTHS, HEIGHTS, resolution_px=1024)
    assert tuple(b["count"] for b in found["buckets"]) == expected.counts
    assert found["share_upscaled"] == expected.enlarged
    assert found["crop_loss"]["mean"] == pytest.approx(expected.cropped, abs=2e-3)  # there, sides are not rounded
    assert found["crop_loss"]["p99"] == pytest.approx(expected.worst, abs=0.011)


@pytest.mark.parametrize(
    ("canvases", "width", "height"),
    [(["128x480", "240x256"], 2, 1), (["128x512", "400x144"], 6, 5), (["112x432", "336x144"], 9, 7)],
)
def test_images_halfway_between_two_canvases_go_where_extract_sends_them(canvases, width, height):
    """As a rule no image has the very ratio in the middle; with tables of one's own it may."""
    widths, heights = width * np.arange(1, 300), height * np.arange(1, 300)
    counter = FrameCounter(256, canvases)
    counter.add(widths, heights)
    pairs = zip(widths.tolist(), heights.tolist(), strict=True)
    chosen = [nearest_bucket(w, h, counter.table).ratio for w, h in pairs]
    assert {b["ratio"]: b["count"] for b in counter.to_json()["buckets"]} == {
        bucket.ratio: chosen.count(bucket.ratio) for bucket in counter.table
    }


def test_an_image_of_its_canvas_loses_nothing_and_one_of_twice_its_width_loses_half():
    found = counted([512], [512], resolution_px=512)
    assert (found["crop_loss"]["mean"], found["num_upscaled"], found["crop_loss"]["counts"][0]) == (0.0, 0, 1)
    found = counted([2048], [1024], buckets=["256x256"])
    assert found["crop_loss"]["mean"] == pytest.approx(0.5)
    assert found["crop_loss"]["counts"][50] == 1
    assert found["crop_loss"]["p99"] == 0.51


def test_histograms_hold_every_image_once_a_lower_edge_included():
    found = counted([1024, 1023, 8, 100_000, 1 << 31], [1024, 1024, 8, 100_000, 1])
    assert found["num_without_size"] == 1  # no format has such a side
    for name in ("megapixels", "shorter_side_px"):
        assert len(found[name]["edges"]) == len(found[name]["counts"]) + 1
        assert sum(found[name]["counts"]) == 4 == found["num_images"]
        assert found[name]["counts"][0] == found[name]["counts"][-1] == 1  # beyond the ends
        assert found[name]["edges"] == sorted(found[name]["edges"])
    side = found["shorter_side_px"]
    assert side["counts"][side["edges"].index(1024)] == 1
    assert side["counts"][side["edges"].index(1024) - 1] == 1
    area = found["megapixels"]
    assert area["counts"][area["edges"].index(1.048576)] == 1
    assert area["counts"][area["edges"].index(1.048576) - 1] == 1


HOSTILE = [0, -1, None, 0.5, float("nan"), float("inf"), -float("inf"), 1e30]


@pytest.mark.parametrize(
    "column",
    [
        [*HOSTILE, 10**400, -(10**400), "512", b"512", [512], object()],
        pa.array(HOSTILE, pa.float64()),
        pa.chunked_array([pa.array(HOSTILE, pa.float64()), pa.array([], pa.float64())]),
        np.array([0, -1, np.nan, np.inf, 1e30]),
        np.array(["512", "x"]),
        pa.array([0, -1, None, 1 << 62, -(1 << 63)], pa.int64()),
        pa.array([(1 << 64) - 1], pa.uint64()),
        pa.array([Decimal("-1.5"), None], pa.decimal128(20, 4)),
        pa.array(["512", "", None]),
        pa.array([True, False]),
        pa.array([[512], None]),
        pa.nulls(3),
    ],
)
def test_what_is_no_size_is_counted_as_none(column):
    good = [512] * len(column)
    found = counted(column, good)
    assert (found["num_images"], found["num_without_size"]) == (0, len(column))
    assert counted(good, column) == found
    assert found["crop_loss"]["mean"] == found["crop_loss"]["p99"] == found["share_upscaled"] == 0.0


@pytest.mark.parametrize(
    "column",
    [
        [640, 480.7, None],
        np.array([640, 480.7, 0]),
        pa.array([640, 480, None], pa.uint16()),
        pa.array([640.0, 480.0, None], pa.float32()),
        pa.array([Decimal(640), Decimal(480), None], pa.decimal128(20, 4)),
        pa.chunked_array([[640], [480, None]]),
    ],
    ids=str,
)
def test_numbers_of_any_type_are_sizes(column):
    found = counted(column, [480, 640, 1])
    assert found == counted([640, 480, 0], [480, 640, 1])
    assert found["num_images"] == 2


def test_a_width_without_its_height_is_a_mistake():
    with pytest.raises(ValueError, match="expected a height for each width, found 1 for 2"):
        FrameCounter().add([1, 2], [1])


def test_parts_add_up_to_the_whole_in_any_order():
    whole = counted(WIDTHS, HEIGHTS)
    cuts = [slice(0, 10), slice(10, 10), slice(10, 2000), slice(2000, None)]
    for order in (cuts, cuts[::-1]):
        merged = FrameCounter()
        for cut in order:
            part = json.loads(json.dumps(counted(WIDTHS[cut], HEIGHTS[cut])))
            merged.merge(FrameCounter.from_json(part))
        assert merged.to_json() == whole


def test_a_counter_read_back_counts_on():
    counter = FrameCounter.from_json(counted(WIDTHS[:50], HEIGHTS[:50]))
    counter.add(WIDTHS[50:], HEIGHTS[50:])
    assert counter.to_json() == counted(WIDTHS, HEIGHTS)


def test_counts_on_other_canvases_are_not_added():
    for other in (FrameCounter(512), FrameCounter(256, ["256x256"])):
        with pytest.raises(DataError, match=r"expected those counted on 40 canvases of 256 px, found .*; count again"):
            FrameCounter(256).merge(other)


def test_there_are_three_tables():
    with pytest.raises(ConfigError, match="expected one of"):
        FrameCounter(300)


@pytest.mark.parametrize(
    "facts", [{}, {"resolution_px": 256, "buckets": 3}, None, counted([1], [1]) | {"megapixels": {"counts": [1]}}]
)
def test_facts_of_something_else_are_told(facts):
    with pytest.raises(DataError, match="expected what a count of them wrote, found"):
        FrameCounter.from_json(facts)
