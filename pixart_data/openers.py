"""How sentences begin: counted over a corpus in bounded memory."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import pyarrow as pa

from pixart_data.tagging.blocks import Block
from pixart_data.tagging.vocabulary import Vocabulary

NUM_WORDS = 3
"""An opener is the first so many tokens of a sentence, in lower case, or the whole of a shorter one."""

KEPT = 500
"""So many openers leave a worker, the most frequent ones."""

_MAX_ROWS = 1 << 19
_MAX_MERGED = 1 << 16
_NONE = -1
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class OpenerCounter:
    """Counts openers as word ids; texts are made of the few that are asked for.

    Exact up to 524,288 different openers. From then on the rarer half is dropped, now and again, and `missed_at_most`
    says how much any opener may have been undercounted.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._start()

    def _start(self) -> None:
        self._parts: list[pa.Table] = []
        self._num_rows = 0
        self._missed = 0

    def add(self, block: Block) -> None:
        """Count the openers of a block."""
        folded = self._vocabulary.folded()
        at = np.flatnonzero(block.begins)
        ends = np.append(at[1:], len(block.words))
        captions = np.searchsorted(block.offsets, at, "right")
        ends = np.minimum(ends, block.offsets[captions])
        words = {}
        keys = np.zeros(len(at), np.uint64)
        for i in range(NUM_WORDS):
            there = at + i < ends
            word = np.where(there, block.words[np.where(there, at + i, at)], _NONE) if len(at) else at
            keys = keys * _FACTOR + np.where(there, folded[word] + np.uint64(1), np.uint64(0))
            words[f"word_{i}"] = word.astype(np.int32)
        self._add(pa.table({"key": keys, "count": np.ones(len(at), np.int64), **words}))

    def _add(self, table: pa.Table) -> None:
        self._parts.append(_grouped(table))
        self._num_rows += self._parts[-1].num_rows
        if self._num_rows > 2 * _MAX_ROWS:
            table = self._merged()
            if table.num_rows > _MAX_ROWS:
                self._missed += int(table["count"][_MAX_ROWS // 2].as_py())
                table = table.slice(0, _MAX_ROWS // 2).combine_chunks()
            self._parts, self._num_rows = [table], table.num_rows

    def _merged(self) -> pa.Table:
        """Return the openers, the most frequent first, those of one count by their key: the same in any order."""
        return _grouped(pa.concat_tables(self._parts)).sort_by([("count", "descending"), ("key", "ascending")])

    def take(self) -> "Openers":
        """Return what was counted since the last time, and start anew."""
        openers = Openers()
        if self._parts:
            table = self._merged()
            missed = self._missed + (table["count"][KEPT].as_py() if table.num_rows > KEPT else 0)
            openers = Openers(((self._text(row), row["count"]) for row in table.slice(0, KEPT).to_pylist()), missed)
        self._start()
        return openers

    def _text(self, row: dict[str, Any]) -> str:
        ids = [row[f"word_{i}"] for i in range(NUM_WORDS)]
        return " ".join(self._vocabulary.surface(word).lower() for word in ids if word != _NONE)


def _grouped(table: pa.Table) -> pa.Table:
    """Sum the counts of each opener; any word of those that differ in case only stands for it."""
    words = [f"word_{i}" for i in range(NUM_WORDS)]
    sums = table.group_by("key").aggregate([("count", "sum"), *((word, "min") for word in words)])
    names = {"count_sum": "count", **{f"{word}_min": word for word in words}}
    return sums.rename_columns([names.get(name, name) for name in sums.column_names])


class Openers:
    """Counts of openers that are small and can be merged.

    Attributes:
        counts: Sentences by opener, the most frequent ones.
        missed_at_most: No count is too high, and none is too low by more than this; 0: all are exact.
    """

    def __init__(self, counts: Iterable[tuple[str, int]] = (), missed_at_most: int = 0) -> None:
        self.counts = dict(counts)
        self.missed_at_most = missed_at_most

    def merge(self, other: Self) -> None:
        """Add the openers of another unit."""
        self.missed_at_most += other.missed_at_most
        for opener, count in other.counts.items():
            self.counts[opener] = self.counts.get(opener, 0) + count
        if len(self.counts) > _MAX_MERGED:
            self._cut(_MAX_MERGED // 2)

    def _cut(self, count: int) -> None:
        """Keep so many, and count what the others may have had as missed."""
        ordered = self.top(count + 1)
        if len(ordered) > count:
            self.missed_at_most += ordered[count][1]
        self.counts = dict(ordered[:count])

    def top(self, count: int) -> list[tuple[str, int]]:
        """Return the most frequent openers and their sentences; those of one count by their letters."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:count]

    def to_json(self) -> dict[str, Any]:
        """Return the `KEPT` most frequent ones."""
        kept = Openers(self.counts.items(), self.missed_at_most)
        kept._cut(KEPT)
        return {"counts": [list(pair) for pair in kept.top(KEPT)], "missed_at_most": kept.missed_at_most}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Self:
        """Return what `to_json` was made of, but for the rare ones."""
        return cls(((opener, count) for opener, count in facts["counts"]), facts["missed_at_most"])
