"""What is learnt of captions besides their nouns: sums that a unit's record carries, and that add up over units."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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

_LOOKED_AT = np.union1d(np.arange(16), np.arange(1000) ** 3 // 6)  # rows of a unit: 28 of 750, 78 of 50,000
_PAIR_FIGURES = ("num_captions", "num_nouns", "num_distinct_nouns")


@dataclass
class Facts:
    """Sums over the captions of a unit, or of several.

    Attributes:
        totals: Of the quality measures.
        rejections: Rows without a caption by their reason: that of the table's own column `error`, where it has one.
        languages: Captions of a sample by language; what is not sure counts as English.
        pairs: Of captions whose row has one in the other column, too: how many, and their nouns.
        frames: None where the table has no sizes of images.
        lengths: None where they are not measured.
        problem: What is wrong with the first row that is damaged.
    """

    totals: Totals = field(default_factory=Totals)
    rejections: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
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
        self._add_languages(rows.captions, self.totals.num_captions + self.totals.num_empty)
        self.totals.add(measures, failed)
        self._add_rejections(rows)
        if "beside" in rows.more:
            self._add_pairs(measures, rows.more["beside"])
        self.problem = self.problem or rows.problem

    def add_sizes(self, rows: Rows, resolution_px: int) -> None:
        """Add the sizes of the images, where the rows have them."""
        if "width_px" in rows.more and "height_px" in rows.more:
            self.frames = self.frames or FrameCounter(resolution_px)
            self.frames.add(rows.more["width_px"], rows.more["height_px"])

    def _add_rejections(self, rows: Rows) -> None:
        absent = pc.is_null(rows.captions)
        num_absent = pc.sum(absent).as_py() or 0
        if rows.num_bad:
            self.rejections[Reason.BAD_ROW] += rows.num_bad
        if "error" in rows.more and not rows.num_bad:
            reasons = pc.fill_null(rows.more["error"].filter(absent), str(Reason.NO_CAPTION))
            self.rejections.update({row["values"]: row["counts"] for row in pc.value_counts(reasons).to_pylist()})
        elif num_absent > rows.num_bad:
            self.rejections[Reason.NO_CAPTION] += num_absent - rows.num_bad

    def _add_languages(self, captions: pa.Array, num_before: int) -> None:
        """Find out the language of some captions: many of the first, fewer of later ones, whatever the batches are."""
        places = _LOOKED_AT - num_before
        places = places[(places >= 0) & (places < len(captions))]
        for caption in captions.take(pa.array(places)).to_pylist():
            code, probability = language(caption)
            if code is not None:
                self.languages[code if (probability or 0.0) >= SURE else ENGLISH] += 1

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
                Totals.from_json(facts["totals"]),
                Counter(facts["rejections"]),
                Counter(facts["languages"]),
                Counter(facts["pairs"]),
                FrameCounter.from_json(facts["frames"]) if facts["frames"] else None,
                Lengths.from_json(facts["lengths"]) if facts["lengths"] else None,
                facts["problem"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"expected what `pixart stats` noted of a unit, found damage ({error!r})") from error

    @classmethod
    def merged(cls, parts: Iterable["Facts"]) -> "Facts":
        """Add up the facts of units, in whatever order."""
        total = cls()
        for part in parts:
            total.totals.merge(part.totals)
            total.rejections.update(part.rejections)
            total.languages.update(part.languages)
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

    @property
    def language(self) -> dict[str, Any]:
        """How many of the captions that were looked at are in another language, and whether that is most of them."""
        num_other = self.languages.total() - self.languages[ENGLISH]
        share = num_other / max(self.languages.total(), 1)
        return {
            "num_captions": self.languages.total(),
            "share_other": share,
            "flagged": share > MOST_OTHER,
            "most": [[code, count] for code, count in self.languages.most_common(3)],
        }
