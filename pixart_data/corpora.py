"""What the noun report says of each set of captions, as one record, and as `stats.json`."""

import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from pixart_data.errors import ConfigError, DataError
from pixart_data.nouns import (
    DEFINITION,
    THRESHOLD,
    VIEWS,
    Distinct,
    NounCounts,
    NounStats,
    definition,
    require_one_tagger,
)
from pixart_data.pages import printable
from pixart_data.rarefaction import Growth, expected
from pixart_data.records import Reason
from pixart_data.renderings import shortened

FORMAT = "pixart-stats"
VERSION = 2
PAPER = "PixArt-alpha, Table 1"
PAPER_CAPTIONS = 11_200_000
"""About the size of all four sets of the paper's table: total nouns over nouns per image."""

THRESHOLDS = (0, 1, 2, 5, 10, 20, 50, 100)
TOP_NOUNS = 50
GAINED_NOUNS = 100

_NUM_RANKS = 200
_COMPARABLE_RATIO = 1.5


@dataclass(frozen=True)
class Corpus:
    """One set of captions.

    Attributes:
        stats: Its row of Table 1.
        views: The same by other rules of what makes two nouns the same, by view, `stats`' own among them.
        thresholds: Valid nouns by threshold.
        growth: Expected figures of random subsets, the last of all captions.
        rarefied: The same at the size of each smaller set of the report, of the smallest at its own, and at the
            paper's size where there are more captions.
        per_caption: At k, the captions with k nouns; the last is "or more".
        ranks: (rank, count) at log-spaced ranks, the first 1, the last the number of distinct nouns.
        top: The most frequent nouns, (noun, count).
        gained: The most frequent of the nouns valid here and not in `gained_over`: (noun, count here, count there).
        gained_over: Name of the set it is compared with.
        num_gained: Nouns valid here and not there.
        num_lost: Nouns valid there and not here.
        quality: `quality.Totals.to_json()`.
        lengths: In tokens: tokenizer, max_tokens, num_captions, share_truncated, counts; None if not measured.
        frames: Sizes, buckets and crop losses of the images; None if not known.
        rejections: Rows of the caption tables without a caption, by reason.
        language: share_other, flagged: whether the captions are in English at all.
        gate: Captions by what they fail.
        pairs: Of captions whose image has one in the other column, too, num_captions, num_nouns and num_distinct_nouns
            (in each caption, added up): what compares raw and dense captions on the same images.
    """

    name: str
    stats: NounStats
    views: dict[str, NounStats] = field(default_factory=dict)
    thresholds: dict[int, int] = field(default_factory=dict)
    growth: list[Growth] = field(default_factory=list)
    rarefied: list[Growth] = field(default_factory=list)
    per_caption: list[int] = field(default_factory=list)
    ranks: list[tuple[int, int]] = field(default_factory=list)
    top: list[tuple[str, int]] = field(default_factory=list)
    gained: list[tuple[str, int, int]] = field(default_factory=list)
    gained_over: str | None = None
    num_gained: int = 0
    num_lost: int = 0
    quality: dict[str, Any] | None = None
    lengths: dict[str, Any] | None = None
    frames: dict[str, Any] | None = None
    rejections: dict[str, int] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Extras:
    """What is known of a set beside its nouns; each is the field of that name in `Corpus`."""

    quality: dict[str, Any] | None = None
    lengths: dict[str, Any] | None = None
    frames: dict[str, Any] | None = None
    rejections: dict[str, int] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)


def _paper_row(valid: int, distinct: int, vn_dn: float, total: int, per_image: float) -> NounStats:
    return NounStats(
        num_captions=int(round(total / per_image, -4)),
        num_empty=0,
        distinct_nouns=distinct,
        valid_nouns=valid,
        vn_dn=vn_dn,
        total_nouns=total,
        nouns_per_image=per_image,
        approximate=False,
        tagger="nltk, version not published",
        rule="not published",
    )


PAPER_ROWS: Mapping[str, NounStats] = {
    "LAION": _paper_row(210_000, 2_461_000, 0.085, 72_000_000, 6.4),
    "LAION-LLaVA": _paper_row(85_000, 646_000, 0.133, 233_900_000, 20.9),
    "SAM-LLaVA": _paper_row(23_000, 124_000, 0.186, 327_900_000, 29.3),
    "Internal": _paper_row(152_000, 582_000, 0.261, 136_600_000, 12.2),
}
"""The paper's rows as printed, rounding included; the number of captions is derived: total over average."""


def build(
    sets: Mapping[str, NounCounts],
    extras: Mapping[str, Extras] | None = None,
    compare: Mapping[str, str] | None = None,
    threshold: int = THRESHOLD,
) -> list[Corpus]:
    """Derive everything the report says from the counts of all its sets, in their order.

    Args:
        extras: By the name of the set.
        compare: By the name of a set, the set whose nouns it is held against, for `gained`.

    Raises:
        ConfigError: If a set to compare is not there.
        DataError: If two sets were counted by different taggers.
    """
    require_one_tagger(sets.values())
    unknown = [name for pair in (compare or {}).items() for name in pair if name not in sets]
    if unknown:
        raise ConfigError(f"compare: expected names of {', '.join(sets)}, found '{unknown[0]}'; name a set of the job")
    distinct = {name: Distinct.of(counts) for name, counts in sets.items()}
    sizes = sorted({counts.num_captions for counts in sets.values() if counts.num_captions})
    return [
        _corpus(name, distinct, sizes, (compare or {}).get(name), threshold, (extras or {}).get(name, Extras()))
        for name in sets
    ]


def _corpus(
    name: str, sets: Mapping[str, Distinct], sizes: Sequence[int], over: str | None, threshold: int, extras: Extras
) -> Corpus:
    distinct = sets[name]
    counts = distinct.source
    views = {
        str(view): (distinct if view == distinct.view else Distinct.of(counts, view)).stats(threshold) for view in VIEWS
    }
    gains = [] if over is None else gained(distinct, sets[over], threshold)
    losses = [] if over is None else gained(sets[over], distinct, threshold)
    return Corpus(
        name=name,
        stats=distinct.stats(threshold),
        views=views,
        thresholds={
            limit: int(np.count_nonzero(distinct.counts > limit)) for limit in sorted({*THRESHOLDS, threshold})
        },
        growth=expected(distinct, threshold=threshold),
        rarefied=expected(distinct, _shared_sizes(counts.num_captions, sizes), threshold),
        per_caption=counts.per_caption.tolist(),
        ranks=ranks(distinct),
        top=distinct.top(TOP_NOUNS),
        gained=gains[:GAINED_NOUNS],
        gained_over=over,
        num_gained=len(gains),
        num_lost=len(losses),
        quality=extras.quality,
        lengths=extras.lengths,
        frames=extras.frames,
        rejections=extras.rejections,
        language=extras.language,
        gate=extras.gate,
        pairs=extras.pairs,
    )


def _shared_sizes(num_captions: int, sizes: Sequence[int]) -> list[int]:
    """Return the sizes at which a set of so many captions is compared with others, rising."""
    smaller = {size for size in (*sizes, PAPER_CAPTIONS) if size < num_captions}
    return sorted(smaller | ({num_captions} if sizes and num_captions == sizes[0] else set()))


def gained(distinct: Distinct, other: Distinct, threshold: int = THRESHOLD) -> list[tuple[str, int, int]]:
    """Return the nouns valid in one set and not in the other: (noun, count here, count there), most frequent first."""
    valid = pa.array(distinct.counts > threshold)
    nouns, here = distinct.nouns.filter(valid), distinct.counts[distinct.counts > threshold]
    places = pc.index_in(nouns, value_set=other.nouns).fill_null(-1).to_numpy()
    there = np.append(other.counts, 0)[places]
    new = there <= threshold
    rows = zip(nouns.filter(pa.array(new)).to_pylist(), here[new].tolist(), there[new].tolist(), strict=True)
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def ranks(distinct: Distinct) -> list[tuple[int, int]]:
    """Return (rank, count) at about 200 log-spaced ranks, the first and the last among them."""
    counts = np.sort(distinct.counts)[::-1]
    if not len(counts):
        return []
    places = np.unique(np.geomspace(1, len(counts), _NUM_RANKS).round().astype(np.int64))
    return list(zip(places.tolist(), counts[places - 1].tolist(), strict=True))


def notes(corpora: Sequence[Corpus]) -> list[str]:
    """Return what a reader must know before comparing rows, one line each."""
    threshold = next((corpus.stats.threshold for corpus in corpora), THRESHOLD)
    lines = [
        f"VN: distinct nouns that appear more than {threshold} times. DN: distinct nouns.",
        f"(paper): {PAPER}, as printed; its number of captions is derived (total / nouns per image).",
    ]
    approximate = dict.fromkeys(corpus.stats.tagger for corpus in corpora if corpus.stats.approximate)
    if approximate:
        lines.append(
            f"~ approximate: counted with {', '.join(approximate)}; against NLTK, averages differ by up to "
            "about 3% and DN by about 13%. Not comparable with rows counted by NLTK, the paper's among them."
        )
    if threshold != THRESHOLD:
        lines.append(f"The paper's threshold is {THRESHOLD}: its VN and VN/DN do not compare with these.")
    sizes = [corpus.stats.num_captions for corpus in corpora]
    sizes += [] if approximate else [PAPER_CAPTIONS]  # which nothing approximate compares with
    if max(sizes, default=0) > _COMPARABLE_RATIO * min(sizes, default=0):
        lines.append(
            f"VN/DN grows with sample size: rows with different numbers of captions do not compare "
            f"(here {min(sizes):,} to {max(sizes):,}); the figures rarefied to equal size do."
        )
    return [*lines, *(line for corpus in corpora if (line := _not_counted(corpus)))]


def _not_counted(corpus: Corpus) -> str:
    """Say which rows of a set are without a caption; empty if all have one."""
    num_damaged = corpus.rejections.get(Reason.BAD_ROW, 0)
    num_empty = corpus.stats.num_empty - num_damaged
    kinds = [f"{num_empty:,} null or blank caption{'s' * (num_empty != 1)}"] if num_empty else []
    kinds += [f"{num_damaged:,} damaged row{'s' * (num_damaged != 1)}"] if num_damaged else []
    verb = "is" if corpus.stats.num_empty == 1 else "are"
    return f"{shortened(corpus.name)}: {' and '.join(kinds)} {verb} not counted." if kinds else ""


def to_json(corpora: Sequence[Corpus]) -> dict[str, Any]:
    """Return the report as JSON-able data; every row says its definition, its tagger and whether it is approximate."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "definition": definition(corpora[0].stats) if corpora else DEFINITION,
        "sets": [_json_set(corpus) for corpus in corpora],
        "paper": [{"name": name, "source": PAPER, "stats": _json_row(stats)} for name, stats in PAPER_ROWS.items()],
        "notes": notes(corpora),
        "made_with": made_with(),
    }


def from_json(report: Any) -> list[Corpus]:
    """Read the user's sets back from what `to_json` made.

    Raises:
        DataError: If it is something else, of another version of the toolkit, or damaged.
    """
    found = (report.get("format"), report.get("version")) if isinstance(report, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise DataError(
            f"stats.json: expected {FORMAT} version {VERSION}, found {found[0]} version {found[1]}; "
            "run `pixart stats` again"
        )
    try:
        return _adapter().validate_python(report["sets"])
    except KeyError:
        raise DataError("stats.json: expected a list of sets, found none; run `pixart stats` again") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("sets", *first["loc"])))
        raise DataError(f"stats.json: {where} is damaged ({first['msg']}); run `pixart stats` again") from error


def made_with() -> dict[str, str]:
    """Return the versions that a report names."""
    try:
        toolkit = version("pixart-toolkit")
    except PackageNotFoundError:
        toolkit = "not installed"
    return {"pixart-toolkit": toolkit, "Python": platform.python_version()}


@functools.cache
def _adapter() -> TypeAdapter[list[Corpus]]:
    return TypeAdapter(list[Corpus])


def _json_set(corpus: Corpus) -> dict[str, Any]:
    [row] = _adapter().dump_python([corpus], mode="json")
    row["name"] = printable(corpus.name)
    row["stats"] = _json_row(corpus.stats)
    row["views"] = {view: _json_row(stats) for view, stats in corpus.views.items()}
    return dict(row)


def _json_row(stats: NounStats) -> dict[str, Any]:
    return {"definition": definition(stats), **asdict(stats)}
