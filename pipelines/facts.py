"""What is learnt of captions besides their nouns: sums that a unit's record carries, and that add up over units."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data import shares
from pixart_data.columns import Rows
from pixart_data.errors import DataError
from pixart_data.filters import language
from pixart_data.frames import FrameCounter
from pixart_data.lengths import Lengths
from pixart_data.quality import Totals
from pixart_data.records import Reason

ENGLISH = "en"
SURE = 0.5
"""So probable must another language be to count; a handful of words can be of any."""
MOST_OTHER = 0.5
"""A corpus with a larger share of captions in other languages is flagged: the tagger knows English only."""

_LOOKED_AT = 200  # captions of a unit at most, on average more than half as many
_READ_CHARS = 100  # of each: more costs three times as much and finds the same
_PAIR_FIGURES = ("num_captions", "num_nouns", "num_distinct_nouns")


class LanguageSample:
    """Finds out the language of some captions of a unit, drawn evenly by `shares` from however many there are.

    Args:
        file: What the unit's file is called, however it is cut.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._level = 0
        self._drawn: list[tuple[int, str]] = []

    def add(self, captions: pa.Array, first_row: int) -> None:
        """Draw from neighbouring rows of the file, the first of this number."""
        self._level = max(self._level, shares.level_of(len(captions), _LOOKED_AT))
        levels = shares.levels(self._file, first_row, len(captions))
        places = np.flatnonzero(levels >= self._level)
        texts = captions.take(pa.array(places)).to_pylist()
        self._drawn += [(level, text) for level, text in zip(levels[places].tolist(), texts, strict=True) if text]
        while len(self._drawn) > _LOOKED_AT:
            self._level += 1
            self._drawn = [(level, text) for level, text in self._drawn if level >= self._level]

    def languages(self) -> Counter[str]:
        """Return the captions drawn by language; what is not sure counts as English."""
        found = (language(text[:_READ_CHARS]) for _, text in self._drawn)
        return Counter(code if (chance or 0.0) >= SURE else ENGLISH for code, chance in found if code is not None)


def num_without(measures: pa.RecordBatch) -> int:
    """Return how many rows have no caption: a null one, a blank one, or damage in its place."""
    return int(measures["num_tokens"].null_count)


@dataclass
class Facts:
    """Sums over the captions of a unit, or of several.

    Attributes:
        totals: Of the quality measures.
        rejections: Rows without a caption by their reason: that of the table's own column `error`, where it has one.
        languages: Captions of a sample by language, see `LanguageSample`.
        spoken: Of merged facts, how many of all captions are in each language, by the samples of their units.
        pairs: Of captions whose row has one in the other column, too: how many, and their nouns.
        frames: None where the table has no sizes of images.
        lengths: None where they are not measured.
        problem: What is wrong with the first row that is damaged.
    """

    totals: Totals = field(default_factory=Totals)
    rejections: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    spoken: dict[str, float] = field(default_factory=dict)
    pairs: Counter[str] = field(default_factory=Counter)
    frames: FrameCounter | None = None
    lengths: Lengths | None = None
    problem: str = ""

    def add(self, rows: Rows, measures: pa.RecordBatch, failed: pa.Array) -> None:
        """Add some rows of a file, in their order.

        Args:
            measures: Their `quality.MEASURES`.
            failed: What `gates.failures` says of them.
        """
        self.totals.add(measures, failed)
        self._add_rejections(rows, measures)
        if "beside" in rows.more:
            self._add_pairs(measures, rows.more["beside"])
        self.problem = self.problem or rows.problem

    def add_sizes(self, rows: Rows, resolution_px: int) -> None:
        """Add the sizes of the images, where the rows have them."""
        if "width_px" in rows.more and "height_px" in rows.more:
            self.frames = self.frames or FrameCounter(resolution_px)
            self.frames.add(rows.more["width_px"], rows.more["height_px"])

    def _add_rejections(self, rows: Rows, measures: pa.RecordBatch) -> None:
        absent, num_absent = pc.is_null(measures["num_tokens"]), num_without(measures)
        if rows.num_bad:
            self.rejections[Reason.BAD_ROW] += rows.num_bad
        if "error" in rows.more and not rows.num_bad:
            reasons = pc.fill_null(rows.more["error"].filter(absent), str(Reason.NO_CAPTION))
            self.rejections.update({row["values"]: row["counts"] for row in pc.value_counts(reasons).to_pylist()})
        elif num_absent > rows.num_bad:
            self.rejections[Reason.NO_CAPTION] += num_absent - rows.num_bad

    def _add_pairs(self, measures: pa.RecordBatch, beside: pa.Array) -> None:
        has_other = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(beside)), 0)
        both = pc.and_(pc.is_valid(measures["num_tokens"]), pc.fill_null(has_other, False))
        self.pairs["num_captions"] += pc.sum(both).as_py() or 0
        for name in _PAIR_FIGURES[1:]:
            self.pairs[name] += pc.sum(measures[name].filter(both)).as_py() or 0

    def to_json(self) -> dict[str, Any]:
        """Return what a record keeps of a unit."""
        return {
            "totals": self.totals.to_json(),
            "rejections": dict(sorted(self.rejections.items())),
            "languages": dict(sorted(self.languages.items())),
            "pairs": {name: self.pairs[name] for name in _PAIR_FIGURES} if self.pairs else {},
            "frames": self.frames.to_json() if self.frames else None,
            "lengths": self.lengths.to_json() if self.lengths else None,
            "problem": self.problem,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Facts":
        """Return the facts that `to_json` was called on.

        Raises:
            DataError: If they are something else.
        """
        try:
            return cls(
                totals=Totals.from_json(facts["totals"]),
                rejections=Counter(facts["rejections"]),
                languages=Counter(facts["languages"]),
                pairs=Counter(facts["pairs"]),
                frames=FrameCounter.from_json(facts["frames"]) if facts["frames"] else None,
                lengths=Lengths.from_json(facts["lengths"]) if facts["lengths"] else None,
                problem=facts["problem"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"expected what `pixart stats` noted of a unit, found damage ({error!r})") from error

    @classmethod
    def merged(cls, parts: Iterable["Facts"]) -> "Facts":
        """Add up the facts of units."""
        total = cls()
        for part in parts:
            total.totals.merge(part.totals)
            total.rejections.update(part.rejections)
            total.languages.update(part.languages)
            for code, number in part._spoken().items():
                total.spoken[code] = total.spoken.get(code, 0.0) + number
            total.pairs.update(part.pairs)
            total.problem = total.problem or part.problem
            total._merge_counters(part)
        return total

    def _merge_counters(self, part: "Facts") -> None:
        if part.frames is not None:
            self.frames = self.frames or FrameCounter(part.frames.resolution_px)
            self.frames.merge(part.frames)
        if part.lengths is not None and self.lengths is not None:
            self.lengths.merge(part.lengths)
        self.lengths = self.lengths or part.lengths

    def _spoken(self) -> dict[str, float]:
        """Scale a unit's sample up to its captions: large and small units are looked at equally often."""
        scale = self.totals.num_captions / max(self.languages.total(), 1)
        return {code: count * scale for code, count in self.languages.items()}

    @property
    def language(self) -> dict[str, Any]:
        """Which share of the captions is in another language, by those looked at, and whether that is most of them."""
        spoken = self.spoken or self._spoken()
        total = sum(spoken.values())
        share = 1.0 - spoken.get(ENGLISH, 0.0) / total if total else 0.0
        return {
            "num_captions": self.languages.total(),
            "share_other": share,
            "flagged": share > MOST_OTHER,
            "most": [[code, count] for code, count in self.languages.most_common(3)],
        }
