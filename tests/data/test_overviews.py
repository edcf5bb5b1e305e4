"""What is found out of a dataset, against the same from its files read in full, and the page made of it."""

import base64
import io
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart_data import surveys
from pixart_data.errors import ConfigError, DataError
from pixart_data.figures import LatentSums, TextSums
from pixart_data.miniatures import build_vae
from pixart_data.overviews import Overview, overview_page
from pixart_data.shards import FeatureSet, read_manifest
from pixart_data.surveys import match, space, survey
from pixart_data.thumbnails import Decoder, Thumbnail, choose, thumbnails
from tests.corruption import SETS, build

SCALING = 0.18215
SDXL_MEAN, SDXL_STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)  # of Playground 2.5's config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twelve images in two buckets, ten of them mirrored too; text sets of each codec with shared captions."""
    return build(tmp_path_factory.mktemp("surveyed") / "features")


@pytest.fixture
def opened(dataset):
    found = {path.parent.name: FeatureSet(path.parent) for path in dataset.glob("*/manifest.json")}
    yield found
    for features in found.values():
        features.close()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    build_vae(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(dataset, vae):
    return Decoder(read_manifest(dataset / "256px").model, vae, None, "cpu")


def members(root):
    """Yield the safetensors header and the name of every member of a set."""
    for shard in sorted(root.glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                length = int.from_bytes(data[:8], "little")
                yield member.name, json.loads(data[8 : 8 + length])


# Counting


def test_members_are_counted_once_however_many_rows_share_them(opened):
    for name in SETS:
        rows = pq.read_table(opened[name].root / "index.parquet").to_pylist()
        stored = {(row["shard"], row["offset_bytes"]): row for row in rows}
        totals = survey(opened[name], 1).totals
        assert len(stored) < len(rows)
        assert totals.num_members == len(stored)
        assert totals.size_bytes == sum(row["size_bytes"] for row in stored.values())
        assert totals.num_tokens == sum(row["num_tokens"] for row in stored.values())
        lengths = Counter(row["num_tokens"] for row in rows)
        assert {n: count for n, count in enumerate(totals.lengths.tolist()) if count} == lengths


def test_records_are_counted_across_pieces(opened, monkeypatch):
    whole = [survey(features, 1).totals for features in opened.values()]
    both = match(opened["256px"], opened["text"])
    monkeypatch.setattr(surveys, "_RECORDS_AT_ONCE", 5)
    assert match(opened["256px"], opened["text"]) == both
    for before, features in zip(whole, opened.values(), strict=True):
        after = survey(features, 1).totals
        assert after.lengths.tolist() == before.lengths.tolist()
        assert (after.num_members, after.size_bytes, after.num_flipped, after.flipped_bytes) == (
            before.num_members, before.size_bytes, before.num_flipped, before.flipped_bytes,
        )  # fmt: skip


def test_mirrored_images_are_counted(opened):
    totals = survey(opened["256px"], 1).totals
    assert (totals.num_members, totals.num_flipped) == (12, 10)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1.0])
def test_percentiles_of_lengths_are_numpy_s(opened, share):
    rows = pq.read_table(opened["text"].root / "index.parquet")["num_tokens"].to_numpy()
    expected = np.percentile(rows, 100 * share, method="inverted_cdf")
    assert survey(opened["text"], 1).totals.percentile(share) == expected


def test_every_byte_of_shards_and_tables_is_in_a_portion(opened):
    for features in opened.values():
        found = survey(features, 1)
        files = [*features.root.glob("*/*.tar"), *features.root.glob("codec-*")]
        files += [features.root / name for name in ("index.parquet", "entries.bin", "rejected.parquet")]
        assert found.size_bytes == sum(path.stat().st_size for path in files)
        assert all(portion.size_bytes >= 0 for portion in (*found.shards, *found.tables))


def test_portions_of_shards_are_those_of_the_headers_of_members(opened):
    for features in opened.values():
        expected = Counter()
        for name, header in members(features.root):
            for tensor, fact in header.items():
                what = f"{tensor} {fact['dtype']}" if features.manifest.kind == "text" else tensor
                what = f"mirrored {what}" if ".flipped." in name else what
                what = "the empty caption" if name.startswith("null-caption") else what
                expected[what] += fact["data_offsets"][1] - fact["data_offsets"][0]
        found = {portion.what: portion.size_bytes for portion in survey(features, 1).shards}
        assert found.pop("headers and padding") > 0
        assert {what: size for what, size in found.items() if size} == {w: s for w, s in expected.items() if s}


def test_columns_of_the_index_are_named(opened):
    found = {portion.what for portion in survey(opened["text"], 1).tables}
    assert {"index.parquet: caption", "index.parquet: key", "index.parquet: metadata", "entries.bin"} <= found


def test_match_counts_what_is_in_both(opened):
    images, texts = opened["256px"], opened["text"]
    assert vars(match(images, texts)) == {
        "images": "256px", "texts": "text", "num_both": 12, "num_images": 12, "num_texts": 12,
    }  # fmt: skip
    few = FeatureSet(texts.root)
    few.entries = texts.entries[:5]
    assert match(images, few).num_both == 5
    assert match(few, images).num_both == 5
    few.entries = texts.entries[:0]
    assert match(images, few).num_both == match(few, images).num_both == 0


def test_few_shards_are_no_reason_to_compact_and_many_small_ones_are(opened):
    found = survey(opened["text"], 1)
    assert found.small_shards == 0
    shard = found.manifest.shards[0]
    found.manifest.shards[:] = [shard] * 40
    assert found.small_shards == 40
    found.manifest.shards[:] = [{**shard, "size_bytes": 200_000_000}] * 40
    assert found.small_shards == 0


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (11e12, "11.0 TB")],
)
def test_sizes_are_for_people(size_bytes, words):
    assert space(size_bytes) == words


def test_rejected_rows_are_kept_by_reason(opened):
    assert survey(opened["256px"], 1).rejected == {
        "zero_bytes": [{"key": "a/bad", "error": "zero_bytes", "detail": "of no bytes"}]
    }
    assert len(survey(opened["256px"], 5).rejected["zero_bytes"]) == 2


# Sampling


def test_a_sample_is_bounded_and_the_same_each_time(opened, monkeypatch):
    asked = []
    read_batch = FeatureSet.read_batch

    def counting(self, places, buffers):
        asked.append((self.root.name, tuple(places.offsets)))
        return read_batch(self, places, buffers)

    monkeypatch.setattr(FeatureSet, "read_batch", counting)
    monkeypatch.setattr(surveys, "MOST_SAMPLES", 4)
    first = [survey(features, 1) for features in opened.values()]
    assert all(found.figures.num_samples == 4 for found in first)
    assert sum(len(offsets) for _, offsets in asked) == 4 * len(opened)
    before = list(asked)
    asked.clear()
    assert [survey(features, 1).figures.num_samples for features in opened.values()] == [4] * len(opened)
    assert asked == before


def test_large_members_make_the_sample_smaller(opened, monkeypatch):
    totals = survey(opened["256px"], 1).totals
    monkeypatch.setattr(surveys, "MOST_BYTES", 3 * totals.size_bytes // totals.num_members)
    assert survey(opened["256px"], 1).figures.num_samples == 3


def test_damage_in_the_sample_is_an_alarm_and_no_figure(dataset, tmp_path):
    root = build(tmp_path / "features") / "256px"
    record = FeatureSet(root).entries[0]
    shard = root / FeatureSet(root).shards[record["shard"]]
    data = bytearray(shard.read_bytes())
    data[record["offset"] + 5] ^= 64
    shard.write_bytes(data)
    found = survey(FeatureSet(root), 1)
    assert found.figures.num_samples == 11
    assert [alarm for alarm in found.alarms() if alarm.startswith("damaged: ") and str(shard) in alarm]
    entries = bytearray((root / "entries.bin").read_bytes())
    entries[-5] ^= 1
    (root / "entries.bin").write_bytes(entries)
    found = survey(FeatureSet(root), 1)
    assert found.figures.num_samples == 10
    assert len(found.damaged) == 2
    assert len(thumbnails(FeatureSet(root), [], None, 12)) == 11


@pytest.mark.parametrize("name", ["entries.bin", "index.parquet"])
def test_tables_of_another_length_are_refused(tmp_path, name):
    root = build(tmp_path / "features") / "256px"
    if name == "entries.bin":
        (root / name).write_bytes((root / name).read_bytes()[:-64])
    else:
        pq.write_table(pq.read_table(root / name).slice(1), root / name)
    with pytest.raises(DataError, match=f"{name}: expected 12 rows.*found 11; `pixart verify"):
        survey(FeatureSet(root), 1)


def test_a_missing_index_says_what_to_do(tmp_path):
    root = build(tmp_path / "features") / "text"
    (root / "index.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="pixart verify"):
        survey(FeatureSet(root), 1)
    (root / "index.parquet").unlink()
    with pytest.raises(DataError, match="missing; run `pixart verify"):
        survey(FeatureSet(root), 1)


# Figures of latents


def posteriors(count=40, mean=0.0, std=1 / SCALING, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        means = rng.normal(mean, std, (4, 8, 8))
        yield np.stack([means, np.full_like(means, noise)]).astype(np.float16)


def figures(latents, scaling=SCALING, shift=0.0):
    sums = LatentSums(4)
    for moments in latents:
        sums.add(moments)
    return sums.figures(scaling, shift)


def test_figures_are_those_of_latents_drawn_from_the_posteriors():
    latents = list(posteriors(mean=2.0, noise=3.0))
    found = figures(latents)
    rng = np.random.default_rng(1)
    stacked = np.stack(latents).astype(np.float64)  # (N, 2, C, h, w)
    drawn = stacked[:, 0] + stacked[:, 1] * rng.standard_normal((20, *stacked[:, 1].shape))  # (20, N, C, h, w)
    np.testing.assert_allclose(found.mean, drawn.mean(axis=(0, 1, 3, 4)), atol=0.1)
    np.testing.assert_allclose(found.std, drawn.std(axis=(0, 1, 3, 4)), rtol=0.02)
    assert found.pooled_std == pytest.approx(drawn.std(), rel=0.02)
    np.testing.assert_array_equal(found.least, stacked[:, 0].min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(found.most, stacked[:, 0].max(axis=(0, 2, 3)))
    np.testing.assert_allclose(found.posterior_std, 3.0)


def test_good_latents_alarm_nobody():
    assert list(figures(posteriors()).alarms()) == []
    mean, std = np.array(SDXL_MEAN)[:, None, None], np.array(SDXL_STD)[:, None, None]
    assert list(figures(posteriors(mean=mean, std=std), 0.13025).alarms()) == []
    flux = figures(posteriors(mean=0.1159, std=1 / 0.3611), 0.3611, 0.1159)
    assert list(flux.alarms()) == []
    np.testing.assert_allclose(flux.scaled(flux.mean), 0, atol=0.1)


def with_one(**parts):
    """Posteriors, one of which has another mean or std."""
    latents = list(posteriors())
    latents[3][["mean", "std"].index(*parts)] = next(iter(parts.values()))
    return latents


def with_channel(number, factor, offset):
    latents = list(posteriors())
    for moments in latents:
        moments[0, number] = factor * moments[0, number] + offset / SCALING
    return latents


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        (with_one(mean=np.nan), r"^1 of 40 latents looked at hold NaN.*image\.dtype"),
        (with_one(mean=0), "^1 of 40 latents looked at are zero throughout.*pixart verify"),
        (with_one(std=-12), "^1 of 40 latents looked at have a posterior std below zero.*log-variance"),
        (posteriors(std=1.0, noise=0.01), "multiplied by it already.*divide by it"),
        (posteriors(std=0.7 / SCALING, noise=0.75 / SCALING), "more noise than picture"),
        (with_channel(2, 0.3, 0.0), r"^scaled for training, channel 2 has mean -?0\.0\d and std 0\.3"),
        (with_channel(1, 0.8, 1.2), r"^scaled for training, channel 1 has mean 1\.2"),
        (
            posteriors(std=3 / SCALING),
            r"have a std of (2\.9|3).*expected about 1.*compare image.model and scaling_factor",
        ),
    ],
)
def test_latents_that_cannot_be_right_are_an_alarm_that_says_what_to_do(latents, said):
    alarms = list(figures(latents).alarms())
    assert len(alarms) == 1
    assert re.search(said, alarms[0])


def test_one_alarm_is_enough_for_latents_that_are_all_zero():
    assert len(list(figures(np.zeros((3, 2, 4, 8, 8), np.float16)).alarms())) == 1


def test_latents_that_are_all_bad_have_no_figures_and_one_alarm():
    found = figures(np.full((3, 2, 4, 8, 8), np.inf, np.float16))
    assert (found.num_samples, found.num_used) == (3, 0)
    assert len(list(found.alarms())) == 1


# Figures of text


def test_text_figures_are_those_of_the_values():
    rng = np.random.default_rng(0)
    captions = [rng.standard_normal((n, 64)).astype(np.float32) for n in (3, 9, 5)]
    for caption in captions:
        caption[:, 17] *= 40
    sums = TextSums(64)
    for caption in captions:
        sums.add(caption)
    found = sums.figures()
    stacked = np.concatenate(captions).astype(np.float64)
    np.testing.assert_allclose(found.channel_rms, np.sqrt((stacked**2).mean(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(found.token_rms, np.sort(np.sqrt((stacked**2).mean(axis=1))), rtol=1e-6)
    second = [np.sqrt((caption[1].astype(np.float64) ** 2).mean()) for caption in captions]
    assert found.position_rms[1] == pytest.approx(np.mean(second))
    assert len(found.position_rms) == 9
    assert [channel for channel, _ in found.outliers()] == [17]
    assert list(found.alarms()) == []


def test_zero_vectors_and_nan_in_text_are_alarms():
    sums = TextSums(8)
    padded = np.ones((10, 8), np.float32)
    padded[6:] = 0
    sums.add(padded)
    sums.add(np.full((2, 8), np.nan, np.float32))
    found = sums.figures()
    assert found.zero_share == 0.4
    nan, zero = found.alarms()
    assert nan.startswith("1 of 2 captions looked at hold NaN")
    assert "40.00% of the tokens looked at are zero vectors" in zero
    assert "attention masks" in zero


def test_every_codec_is_decoded_before_it_is_measured(opened):
    for name in SETS:
        found = survey(opened[name], 1).figures
        assert found.num_samples == 12
        assert found.num_nonfinite == 0
        assert 0.7 < np.median(found.token_rms) < 1.3  # the features are normal


def test_a_codec_that_loses_much_is_an_alarm(opened):
    found = survey(opened["short"], 1)
    found.manifest.codec["measured"] = {"channel_error": 0.2}
    assert any("int8 loses 20.0%" in alarm and "bf16-packed" in alarm for alarm in found.alarms())


# Pictures


def test_samples_are_spread_over_buckets_and_within_them(opened):
    images = opened["256px"]
    records = choose(images, 4)
    assert Counter(records["bucket"].tolist()) == {0: 2, 1: 2}
    assert len(set(choose(images, 99)["row"].tolist())) == 12
    images.manifest.buckets[0]["rows"], images.manifest.buckets[1]["rows"] = 1, 11
    assert Counter(choose(images, 5)["row"].tolist()).most_common(1)[0][1] == 1
    assert len(choose(images, 5)) == 5


def test_samples_come_with_their_own_captions(opened):
    texts = pq.read_table(opened["text"].root / "index.parquet").to_pylist()
    caption = {row["key"]: row["caption"] for row in texts}
    found = thumbnails(opened["256px"], [opened["text"], opened["packed"]], None, 12)
    assert {sample.row["key"] for sample in found} == caption.keys()
    for sample in found:
        assert list(sample.texts) == ["text", "packed"]
        assert sample.texts["text"]["caption"] == caption[sample.row["key"]]
        assert sample.jpeg == b""


def test_pictures_have_the_shape_of_their_bucket(opened, decoder):
    images = opened["256px"]
    found = thumbnails(images, [], decoder, 2)
    sizes = [Image.open(io.BytesIO(sample.jpeg)).size for sample in found]
    assert sizes == [(48, 24), (24, 48)]  # ratios 0.50 and 2.00


def test_a_damaged_sample_says_so_in_place_of_its_picture(tmp_path, decoder):
    root = build(tmp_path / "features") / "256px"
    images = FeatureSet(root)
    record = choose(images, 2)[0]
    shard = root / images.shards[record["shard"]]
    data = bytearray(shard.read_bytes())
    data[record["offset"]] ^= 1
    shard.write_bytes(data)
    first, second = thumbnails(images, [], decoder, 2)
    assert first.jpeg == b""
    assert "damaged" in first.problem
    assert second.jpeg
    assert second.problem == ""


def test_a_vae_that_does_not_fit_is_refused(opened, vae, tmp_path):
    model = opened["256px"].manifest.model
    with pytest.raises(ConfigError, match="expected one with 16 latent channels"):
        Decoder({**model, "channels": 16}, vae, None, "cpu")
    with pytest.raises(ConfigError, match="^vae: no such folder"):
        Decoder(model, str(tmp_path / "none"), None, "cpu")


# The page


class Reader(HTMLParser):
    """Collects elements with their attributes, and checks that they are nested."""

    VOID = {"meta", "img", "br", "rect", "line", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture
def page(opened, decoder):
    def make(**options):
        found = [survey(features, 2) for features in opened.values()]
        images = opened["256px"]
        pictures = {"256px": thumbnails(images, [opened["text"]], decoder, 4)}
        return Overview("data/features", found, [match(images, opened["text"])], **{"pictures": pictures, **options})

    return make


def test_the_page_needs_nothing_else_and_is_well_formed(page):
    text = overview_page(page())
    read = Reader(text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in read.found}
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in read.all("img"))
    assert "prefers-color-scheme: dark" in text
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in read.all("svg"))


def test_pictures_stand_beside_their_captions_which_are_their_alt_texts(page):
    read = Reader(overview_page(page()))
    images = read.all("img")
    assert len(images) == 4
    assert all(re.fullmatch(r"caption \d", attrs["alt"]) for attrs in images)
    for attrs in images:
        Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2]))).verify()
    words = "".join(read.text)
    assert re.search(r"caption \d \(\d tokens\).*a/\d.*\d+ x \d+ px, bucket 0\.50", words)


def test_what_a_caption_says_stays_text(page):
    evil = '"><script>alert(1)</script>\n<img src=http://x>'
    row = {"key": "k<b>", "bucket": "1.00", "original_width_px": None, "original_height_px": None, "image_ops": None}
    sample = Thumbnail(row, {"text": {"caption": evil, "num_tokens": 3, "truncated": None}}, jpeg=b"x")
    read = Reader(overview_page(page(pictures={"256px": [sample]})))
    assert "script" not in {tag for tag, _ in read.found}
    assert read.all("img") == [{"src": "data:image/jpeg;base64,eA==", "alt": " ".join(evil.split())}]
    assert "k<b>" in "".join(read.text)
    assert "original size unknown" in "".join(read.text)


def test_the_page_tells_what_the_survey_found(page):
    words = "".join(Reader(overview_page(page(unfinished=["512px"]))).text)
    assert "512px: not finished; run `pixart extract` to its end" in words
    assert "256px: 12 of 12 latents looked at have a posterior std below zero" in words  # they are random
    assert "Buckets: 2 of 2 hold images" in words
    assert "10 images are stored mirrored" in words
    assert "4 rows share the features of a row with the same caption" in words
    assert "256px: 14 rows in = 12 out + 2 rejected" in words
    assert "a/badzero_bytesof no bytes" in words
    for part in ("t5_low U8", "t5_scale BF16", "mirrored moments", "index.parquet: caption"):
        assert part in words


def test_without_a_vae_the_page_says_why(page):
    text = overview_page(page(pictures={}, no_pictures="vae: no such folder; --set vae=FOLDER"))
    assert "No pictures: vae: no such folder; --set vae=FOLDER" in "".join(Reader(text).text)


def test_nothing_in_a_manifest_becomes_markup(opened):
    found = survey(opened["256px"], 1)
    evil = "<script>alert(1)</script>"
    manifest = replace(found.manifest, kind=evil, model={**found.manifest.model, "id": evil}, policy={evil: evil})
    assert evil not in overview_page(Overview("here", [replace(found, manifest=manifest)]))
    buckets = [{**bucket, "ratio": evil} for bucket in found.manifest.buckets]
    text = overview_page(Overview("here", [replace(found, manifest=replace(found.manifest, buckets=buckets))]))
    assert evil not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt; &nbsp;") == 2
