import math
import random

import pytest

from pixart_data.buckets import RESOLUTIONS_PX, Bucket, bucket_table, nearest_bucket, place
from pixart_data.errors import ConfigError, DataError


def random_sizes(count=500, seed=0):
    chance = random.Random(seed)
    return [(round(2 ** chance.uniform(0, 14)), round(2 ** chance.uniform(0, 14))) for _ in range(count)]


def distance(width_px, height_px, bucket):
    return abs(math.log(height_px / width_px) - math.log(bucket.height_px / bucket.width_px))


@pytest.mark.parametrize("resolution_px", RESOLUTIONS_PX)
def test_the_canvases_of_diffusers_are_all_here(resolution_px):
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

    name = f"ASPECT_RATIO_{resolution_px}_BIN"
    theirs = {
        (int(h), int(w)): float(ratio) for ratio, (h, w) in getattr(alpha, name, getattr(sigma, name, {})).items()
    }
    ours = {(bucket.height_px, bucket.width_px): float(bucket.ratio) for bucket in bucket_table(resolution_px)}
    assert len(theirs) == 33
    assert {size: ours.get(size) for size in theirs} == theirs


@pytest.mark.parametrize("resolution_px", RESOLUTIONS_PX)
def test_a_table_is_forty_canvases_of_about_one_area(resolution_px):
    table = bucket_table(resolution_px)
    assert len(table) == len({bucket.ratio for bucket in table}) == 40
    ratios = [bucket.height_px / bucket.width_px for bucket in table]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0.25, 4.0)
    assert Bucket("1.00", resolution_px, resolution_px) in table
    for bucket in table:
        assert bucket.height_px % (resolution_px // 16) == bucket.width_px % (resolution_px // 16) == 0
        assert bucket.height_px * bucket.width_px == pytest.approx(resolution_px**2, rel=0.1)


def test_tables_are_one_table_in_three_sizes():
    small, large = bucket_table(256), bucket_table(1024)
    assert [(b.ratio, 4 * b.height_px, 4 * b.width_px) for b in small] == [
        (b.ratio, b.height_px, b.width_px) for b in large
    ]


@pytest.mark.parametrize("resolution_px", [0, 128, 300, 2048])
def test_other_resolutions_are_refused(resolution_px):
    with pytest.raises(ConfigError, match=rf"resolution: expected one of \(256, 512, 1024\), got {resolution_px}"):
        bucket_table(resolution_px)


def test_every_canvas_is_nearest_to_itself_at_any_scale():
    table = bucket_table(512)
    for bucket in table:
        for factor in (1, 3, 7):
            assert nearest_bucket(factor * bucket.width_px, factor * bucket.height_px, table) == bucket


def test_no_canvas_is_nearer_than_the_nearest():
    table = bucket_table(256)
    for width_px, height_px in random_sizes():
        chosen = distance(width_px, height_px, nearest_bucket(width_px, height_px, table))
        assert chosen == min(distance(width_px, height_px, bucket) for bucket in table)


def test_a_turned_image_goes_to_the_turned_canvas():
    table = bucket_table(256)
    sides = {(bucket.width_px, bucket.height_px) for bucket in table}
    lonely = [bucket for bucket in table if (bucket.height_px, bucket.width_px) not in sides]
    assert [bucket.ratio for bucket in lonely] == ["0.52"]
    turned = 0
    for width_px, height_px in random_sizes():
        upright, lying = nearest_bucket(width_px, height_px, table), nearest_bucket(height_px, width_px, table)
        if upright not in lonely and lying not in lonely:
            assert (upright.width_px, upright.height_px) == (lying.height_px, lying.width_px)
            turned += 1
    assert turned > 400


def test_wide_images_are_not_drawn_to_taller_canvases():
    """Where linear nearness takes 1:1 for 1.45:1, the log takes the nearer of the two canvases beside it."""
    square, tall = Bucket("1.00", 64, 64), Bucket("2.00", 128, 64)
    assert nearest_bucket(100, 145, [square, tall]) == tall  # |1.45 - 1| < |2 - 1.45|, yet 1.45 > sqrt(2)
    assert nearest_bucket(100, 140, [square, tall]) == square


def test_ties_go_to_the_earlier_canvas():
    wide, tall = Bucket("0.50", 64, 128), Bucket("2.00", 128, 64)
    assert nearest_bucket(50, 50, [wide, tall]) == wide
    assert nearest_bucket(50, 50, [tall, wide]) == tall


@pytest.mark.parametrize(("width_px", "height_px"), [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_area_has_no_canvas(width_px, height_px):
    with pytest.raises(DataError, match=f"expected positive sides, got {width_px} x {height_px}"):
        nearest_bucket(width_px, height_px, bucket_table(256))


@pytest.mark.parametrize("resolution_px", RESOLUTIONS_PX)
def test_a_placement_covers_its_canvas_and_is_centred(resolution_px):
    table = bucket_table(resolution_px)
    for width_px, height_px in random_sizes(200, seed=resolution_px):
        bucket = nearest_bucket(width_px, height_px, table)
        placed = place(width_px, height_px, bucket)
        spare_x = placed.resized_width_px - bucket.width_px
        spare_y = placed.resized_height_px - bucket.height_px
        assert min(spare_x, spare_y) == 0
        assert max(spare_x, spare_y) >= 0
        assert 0 <= spare_x - 2 * placed.crop_left_px <= 1
        assert 0 <= spare_y - 2 * placed.crop_top_px <= 1


def test_a_placement_keeps_the_aspect_ratio():
    table = bucket_table(1024)
    for width_px, height_px in random_sizes(200):
        placed = place(width_px, height_px, nearest_bucket(width_px, height_px, table))
        scale = max(placed.resized_width_px / width_px, placed.resized_height_px / height_px)
        assert abs(placed.resized_width_px - width_px * scale) <= max(1, 0.51 * scale, width_px * scale * 0.001)
        assert abs(placed.resized_height_px - height_px * scale) <= max(1, 0.51 * scale, height_px * scale * 0.001)


def test_an_image_of_the_size_of_its_canvas_is_left_alone():
    for bucket in bucket_table(256):
        placed = place(bucket.width_px, bucket.height_px, bucket)
        assert (placed.resized_width_px, placed.resized_height_px) == (bucket.width_px, bucket.height_px)
        assert (placed.crop_left_px, placed.crop_top_px) == (0, 0)
