"""Corpora made by hand, for what shows them: every field filled, every figure easy to check."""

import dataclasses

from pixart_data.corpora import Corpus
from pixart_data.nouns import VIEWS, NounStats
from pixart_data.rarefaction import Growth

EXACT = NounStats(
    num_captions=750,
    num_empty=0,
    distinct_nouns=1416,
    valid_nouns=329,
    vn_dn=329 / 1416,
    total_nouns=18263,
    nouns_per_image=24.351,
    approximate=False,
    tagger="nltk 3.10.4 averaged_perceptron_tagger_eng",
)
ROUGH = dataclasses.replace(EXACT, approximate=True, tagger="textblob 0.20.1 lexicon (approximate)", num_empty=3)
SMALL = dataclasses.replace(EXACT, num_captions=500, distinct_nouns=2000, valid_nouns=20, vn_dn=0.01, total_nouns=3000)
SMALL = dataclasses.replace(SMALL, nouns_per_image=6.0)

LENGTHS = {
    "tokenizer": "some/t5",
    "max_tokens": 120,
    "share_of_rows": 0.25,
    "num_captions": 200,
    "mean_tokens": 75.0,
    "num_truncated": 50,
    "share_truncated": 0.25,
    "share_of_tokens_lost": 0.0625,
    "counts": [0] * 60 + [150] + [0] * 69 + [50],
}
FRAMES = {
    "resolution_px": 256,
    "num_images": 40,
    "num_without_size": 2,
    "num_upscaled": 10,
    "share_upscaled": 0.25,
    "crop_loss": {
        "mean": 0.03,
        "p99": 0.2,
        "edges": [i / 100 for i in range(101)],
        "counts": [30, 0, 8] + [0] * 12 + [2] + [0] * 84,
    },
    "megapixels": {"edges": [0.0625, 0.125, 0.25, 0.5, 1.0], "counts": [0, 10, 30, 0]},
    "shorter_side_px": {"edges": [256, 512, 1024], "counts": [10, 30]},
    "buckets": [
        {"ratio": "0.5", "height_px": 176, "width_px": 352, "count": 10},
        {"ratio": "1.0", "height_px": 256, "width_px": 256, "count": 30},
        {"ratio": "2.0", "height_px": 352, "width_px": 176, "count": 0},
    ],
}
QUALITY = {
    "num_captions": 750,
    "num_empty": 0,
    "num_failed": 40,
    "failures": {"truncated": 30, "loop": 15},
    "measures": {
        "num_tokens": {"mean": 97.25, "count": 750, "sum": 72937},
        "num_sentences": {"mean": 4.0, "count": 750, "sum": 3000},
        "distinct_share": {"mean": 0.706, "count": 750, "sum": 529_500_000},
        "echo": {"mean": None, "count": 0, "sum": 0},
    },
    "openers": {"counts": [["the image features", 600], ["<i>in</i>", 3]], "missed_at_most": 0},
}


def corpus(name: str = "mine", stats: NounStats = EXACT, **changes) -> Corpus:
    """Return a full record; `stats` decides the sizes."""
    half = Growth(stats.num_captions // 2, stats.distinct_nouns * 0.7, stats.valid_nouns * 0.45, stats.vn_dn * 0.6)
    whole = Growth(stats.num_captions, stats.distinct_nouns, stats.valid_nouns, stats.vn_dn)
    full = Corpus(
        name=name,
        stats=stats,
        views={view: dataclasses.replace(stats, view=view, rule=f"by {view}") for view in VIEWS},
        thresholds={0: stats.distinct_nouns, 10: stats.valid_nouns, 100: 7},
        growth=[Growth(100, stats.distinct_nouns * 0.3, 0.4, 0.001), half, whole],
        rarefied=[],
        per_caption=[0, 10, 20, 70] + [0] * 252,
        ranks=[(1, 978), (2, 753), (10, 100), (100, 11), (1416, 1)],
        top=[("image", 978), ("<script>alert(1)</script>", 7), ("\0", 1)],
        quality=QUALITY,
        lengths=LENGTHS,
        frames=FRAMES,
        rejections={"too_small": 3, "download_failed": 12},
        language={"share_other": 0.01, "flagged": False},
        gate=QUALITY["failures"],
    )
    return dataclasses.replace(full, **changes)


def pair() -> list[Corpus]:
    """Return a raw set and a dense one that is compared with it, larger."""
    raw = corpus("raw", SMALL, rarefied=[Growth(500, 2000, 20, 0.01)], frames=None, lengths=None)
    dense = corpus(
        "dense",
        rarefied=[Growth(500, 1200.4, 250.2, 0.2084)],
        gained=[("scene", 753, 2), ("<b>side</b>", 711, 5)],
        gained_over="raw",
        num_gained=275,
        num_lost=124,
    )
    return [raw, dense]


def bare(name: str = "bare", stats: NounStats = EXACT, **changes) -> Corpus:
    """Return a record of nouns alone, without a figure to draw."""
    return Corpus(name=name, stats=stats, **changes)
