"""Measurements of pictures that are made here: noise with the spectrum of photographs, so that all of it is known."""

import functools
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from pixart_data.config import load
from pixart_data.errors import ConfigError
from pixart_data.filters import CODES, JUDGED, KEPT, UNREADABLE, check_languages, describe, judge, language, measure
from pixart_data.images import decode
from pixart_data.records import MEASURES, Reason
from pixart_data.sections import Filters


@functools.cache
def photograph(seed, width_px=640, height_px=480):
    """Noise whose amplitude falls with the frequency, as in photographs (Field 1987)."""
    generator = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height_px)[:, None], np.fft.rfftfreq(width_px)[None, :])
    frequencies[0, 0] = 1.0
    channels = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * generator.random(frequencies.shape))
        values = np.fft.irfft2(phases / frequencies, s=(height_px, width_px))
        channels.append(np.clip(128 + 50 * (values - values.mean()) / values.std(), 0, 255))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def measured(image, kind="JPEG", **options):
    return measure(decode(encoded(image, kind, **options), max_pixels=1 << 26, min_side_px=512))


def distance_bits(one, other):
    return (one.phash ^ other.phash).bit_count()


def test_other_sizes_and_qualities_of_a_picture_have_nearly_its_hash():
    for seed in range(4):
        image = photograph(seed).resize((1200, 900), Image.Resampling.BICUBIC)
        first = measured(image, quality=95)
        others = [
            measured(image, quality=40),
            measured(image.resize((600, 450), Image.Resampling.LANCZOS)),
            measured(image.resize((300, 225), Image.Resampling.BILINEAR), quality=75),
            measured(image, "PNG"),
            measured(image.convert("L")),
        ]
        assert max(distance_bits(first, other) for other in others) <= 4


def test_a_crop_of_one_per_cent_is_near_and_one_of_ten_is_not():
    """What is near is a matter of the picture; these are medians."""
    for share, low, high in ((0.01, 0, 4), (0.10, 9, 64)):
        distances = []
        for seed in range(9):
            image = photograph(seed)
            left, top = int(image.width * share), int(image.height * share)
            cut = image.crop((left, top, image.width - left, image.height - top))
            distances.append(distance_bits(measured(image), measured(cut)))
        assert low <= np.median(distances) <= high


def test_different_pictures_and_mirrored_ones_are_far():
    hashes = [measured(photograph(seed)) for seed in range(20)]
    far = [distance_bits(one, other) for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(far) > 12
    assert distance_bits(hashes[0], measured(photograph(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 12


@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_picture_of_one_colour_has_no_hash(level):
    flat = Image.new("RGB", (300, 200), (level, level, level))
    assert measured(flat).phash is None
    grain = np.random.default_rng(0).integers(-3, 4, (200, 300, 3)) + level
    assert measured(Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))).phash is None
    flat.paste((200, 30, 30), (100, 60, 200, 140))
    assert measured(flat).phash is not None


def test_sharpness_falls_with_blur_and_hardly_with_size():
    for seed in range(3):
        image = photograph(seed, 800, 600)
        sharp = measured(image).sharpness
        scores = [measured(image.filter(ImageFilter.GaussianBlur(radius))).sharpness for radius in (2, 4, 8)]
        assert sharp > 3 * scores[0] > 3 * scores[1] > 3 * scores[2]
        assert measured(image.resize((1200, 900), Image.Resampling.LANCZOS)).sharpness == pytest.approx(sharp, rel=0.5)


def test_strips_and_dots_are_measured_too():
    for size in ((1, 1), (1, 3000), (3000, 2)):
        found = measured(Image.new("RGB", size, "white"), "PNG")
        assert (found.width_px, found.height_px) == size
        assert found.sharpness == 0.0


def test_a_size_is_that_of_the_original_after_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = measured(photograph(0).resize((2400, 1600)), exif=exif)
    assert (found.width_px, found.height_px) == (1600, 2400)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("A small dog runs along the beach with a red ball", "en"),
        ("Ein kleiner Hund läuft mit einem roten Ball am Strand entlang", "de"),
        ("小さな犬が浜辺を走っています", "ja"),
    ],
)
def test_languages_are_told_apart(text, code):
    found, probability = language(text)
    assert found == code
    assert 0.8 < probability <= 1.0


@pytest.mark.parametrize("text", [None, "", "  ", "12345 - 678", "!?"])
def test_a_text_without_letters_has_no_language(text):
    assert language(text) == (None, None)


def test_two_words_are_of_no_language_for_certain():
    assert language("Nike Air")[1] < Filters().min_language_probability


def test_unknown_languages_are_named():
    check_languages(["en", "de"])
    with pytest.raises(
        ConfigError, match=r"filters\.languages: expected codes such as 'en', found 'english'; use some of: .*en, "
    ):
        check_languages(["en", "english"])


def table(*rows):
    whole = {"width_px": 640, "height_px": 480, "sharpness": 500.0, "key": "k"}
    return pa.Table.from_pylist([{**whole, **row} for row in rows], schema=MEASURES).select(JUDGED)


UNMEASURED = {"width_px": None, "height_px": None, "sharpness": None, "error": "zero_bytes"}
EVERYTHING = {
    "min_side_px": 256,
    "max_aspect": 2.0,
    "min_sharpness": 30.0,
    "watermark_column": "w",
    "max_watermark": 0.8,
    "languages": ["en"],
}


def test_every_filter_is_off_by_default():
    worst = {"width_px": 1, "height_px": 900, "sharpness": 0.0, "watermark": 1.0, "language": "de"}
    assert judge(table(worst | {"language_probability": 1.0}), Filters()).tolist() == [KEPT]


@pytest.mark.parametrize(
    ("filters", "row", "neighbour", "reason"),
    [
        ({"min_side_px": 256}, {"height_px": 255}, {"height_px": 256}, Reason.TOO_SMALL),
        ({"min_side_px": 256}, {"width_px": 255}, {"width_px": 256}, Reason.TOO_SMALL),
        ({"max_aspect": 2.0}, {"width_px": 961}, {"width_px": 960}, Reason.EXTREME_ASPECT),
        ({"max_aspect": 2.0}, {"height_px": 1281}, {"height_px": 1280}, Reason.EXTREME_ASPECT),
        ({"min_sharpness": 30.0}, {"sharpness": 29.9}, {"sharpness": 30.0}, Reason.BLURRED),
        ({"watermark_column": "w", "max_watermark": 0.8}, {"watermark": 0.81}, {"watermark": 0.8}, Reason.WATERMARK),
        ({"watermark_column": "w", "max_watermark": 0.8}, {"watermark": 0.81}, {"watermark": None}, Reason.WATERMARK),
        (
            {"languages": ["en", "fr"]},
            {"language": "de", "language_probability": 0.6},
            {"language": "fr", "language_probability": 0.6},
            Reason.OTHER_LANGUAGE,
        ),
        (
            {"languages": ["en"], "min_language_probability": 0.7},
            {"language": "de", "language_probability": 0.71},
            {"language": "de", "language_probability": 0.69},
            Reason.OTHER_LANGUAGE,
        ),
        ({"languages": ["en"]}, {"language": "de", "language_probability": 0.6}, {}, Reason.OTHER_LANGUAGE),
    ],
)
def test_each_filter_rejects_at_its_threshold(filters, row, neighbour, reason):
    made = Filters(**filters)
    assert judge(table(row, neighbour), made).tolist() == [CODES[reason], KEPT]
    found = describe(reason, table(row).to_pylist()[0], made, "")
    shown = next(value for name, value in row.items() if name != "language_probability")
    assert str(shown) in found


def test_an_unreadable_image_is_not_judged():
    assert judge(table(UNMEASURED, {}), Filters(**EVERYTHING)).tolist() == [UNREADABLE, KEPT]


def test_the_first_filter_that_rejects_counts():
    faults = [
        {"language": "de", "language_probability": 1.0},
        {"watermark": 0.9},
        {"sharpness": 1.0},
        {"width_px": 900, "height_px": 300},
        {"width_px": 100, "height_px": 30},
    ]
    rows = [{}]
    for fault in faults:
        rows.append(rows[-1] | fault)
    expected = ["other_language", "watermark", "blurred", "extreme_aspect", "too_small"]
    assert judge(table(*rows), Filters(**EVERYTHING)).tolist() == [KEPT, *(CODES[Reason(name)] for name in expected)]


def test_a_table_without_rows_is_judged():
    assert judge(table(), Filters(**EVERYTHING)).tolist() == []


def test_a_limit_for_watermarks_needs_their_column():
    with pytest.raises(ConfigError, match=r"watermark_column: required by max_watermark, and missing; LAION's is"):
        load(Filters, None, ["max_watermark=0.5"])
