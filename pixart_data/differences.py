"""What differs between two datasets, whatever shards their samples lie in.

Samples are matched by the hashes of their keys and compared by numbers: sizes and checksums of features, hashes of all
else that the index says. Some 170 bytes are held for each sample of the sets that are compared; no table of texts is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.advice import command
from pixart_data.editions import Numbers, Original, find, identity, require_finished, unfinished_sets, unlike
from pixart_data.entries import key_hashes
from pixart_data.errors import DataError
from pixart_data.shards import feature_sets

Words = npt.NDArray[np.uint64]
"""Hashes, one for each row; (N,)."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0x6A09E667F3BCC909)
_COMPARED_ELSEWHERE = {
    "key", "shard", "offset_bytes", "size_bytes", "crc32", "flipped_offset_bytes", "flipped_crc32", "num_tokens",
    "bucket", "height_px", "width_px", "caption",
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One way in which two sets differ, and what does so.

    Attributes:
        count: Of samples, or of rejected rows; 0 where it is not about these.
        examples: Keys of the first few.
    """

    what: str
    count: int = 0
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.count:
            return self.what
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count:,} {self.what}" + (f": {', '.join(self.examples)}{more}" if self.examples else "")


@dataclass
class Comparison:
    """What two sets of one name have in common, and what not.

    Attributes:
        num_common: Samples in both, the same or not.
        num_same: Samples in both with nothing that differs.
    """

    name: str
    num_common: int = 0
    num_same: int = 0
    differences: list[Difference] = field(default_factory=list)


def compare(left: Path, right: Path, num_examples: int) -> Iterator[Comparison]:
    """Compare two datasets, or two feature sets whatever their names; a set that is not finished is a difference.

    Raises:
        DataError: If there is no sealed set at one of them.
    """
    pair = [feature_sets(root) for root in (left, right)]
    for root, sets in zip((left, right), pair, strict=True):
        if not sets:
            require_finished(root)
            raise DataError(f"{root}: expected a dataset, found no finished feature set; check the path")
    if all(list(sets.values()) == [root] for root, sets in zip((left, right), pair, strict=True)):
        yield compare_sets(left.name, Original(left), Original(right), num_examples)
        return
    unfinished = {path.name: path for root in (left, right) for path in unfinished_sets(root)}
    for name in sorted({*pair[0], *pair[1], *unfinished}):
        if name in unfinished:
            path = unfinished[name]
            yield Comparison(name, differences=[Difference(f"not finished: {path}; run {command(path)} to its end")])
        elif name in pair[0] and name in pair[1]:
            yield compare_sets(name, Original(pair[0][name]), Original(pair[1][name]), num_examples)
        else:
            yield Comparison(name, differences=[Difference(f"only in {left if name in pair[0] else right}")])


def compare_sets(name: str, left: Original, right: Original, num_examples: int) -> Comparison:
    """Compare two sets: what made their features, samples, and rejected rows; of sets of two kinds, nothing."""
    found = Comparison(name)
    kinds = [original.manifest.kind for original in (left, right)]
    if kinds[0] != kinds[1]:
        what = f"kind is {kinds[0]} in {left.root}, {kinds[1]} in {right.root}; name two sets of one kind"
        found.differences.append(Difference(what))
        return found
    for fact, one, other in unlike(identity(left.manifest), identity(right.manifest)):
        found.differences.append(Difference(f"{fact} is {_short(one)} in {left.root}, {_short(other)} in {right.root}"))
    _compare_samples(found, left, right, num_examples)
    _compare_rejected(found, left, right, num_examples)
    return found


def _compare_samples(found: Comparison, left: Original, right: Original, num_examples: int) -> None:
    """Compare row by row of the left index."""
    keys, other_keys = left.column("key"), right.column("key")
    at, common = find(other_keys, keys)
    _, known = find(keys, other_keys)

    def note(what: str, original: Original, rows: Numbers) -> None:
        if len(rows):
            found.differences.append(Difference(what, len(rows), tuple(original.keys(rows[:num_examples].tolist()))))

    note(f"sample(s) only in {left.root}", left, np.flatnonzero(~common))
    note(f"sample(s) only in {right.root}", right, np.flatnonzero(~known))
    rows = np.flatnonzero(common)
    at = at[rows]
    same = np.ones(len(rows), np.bool_)
    for what, one, other in _aspects(left, right, rows, at):
        differs = one != other
        note(what, left, rows[differs])
        same &= ~differs
    found.num_common, found.num_same = len(rows), int(same.sum())


def _aspects(left: Original, right: Original, rows: Numbers, at: Numbers) -> Iterator[tuple[str, Words, Words]]:
    """Yield, for each aspect, how it is told of and what it is of rows of the left and of the right set."""
    yield "sample(s) with other features", _features(left)[rows], _features(right)[at]
    if left.manifest.kind == "image":
        yield "sample(s) in another bucket", _buckets(left)[rows], _buckets(right)[at]
    else:
        yield "sample(s) with another caption", _words(left, ["caption"])[rows], _words(right, ["caption"])[at]
    names = [name for name in left.schema.names if name not in _COMPARED_ELSEWHERE]
    yield f"sample(s) with another {' or '.join(names)}", _words(left, names)[rows], _words(right, names)[at]


def _features(original: Original) -> Words:
    names = ("size", "crc", "num_tokens") if original.manifest.kind == "text" else ("size", "crc", "flipped_crc")
    words = np.zeros(len(original), np.uint64)
    for name in names:
        words = _mixed(words, original.column(name).astype(np.uint64))
    if original.manifest.kind == "image":
        words = _mixed(words, (original.column("flipped_offset") > 0).astype(np.uint64))
    return words


def _buckets(original: Original) -> Words:
    names = [f"{b['ratio']} {b['height_px']} {b['width_px']}" for b in original.manifest.buckets]
    buckets: Words = key_hashes(names)[original.column("bucket")]
    return buckets


def _words(original: Original, columns: Sequence[str]) -> Words:
    """Return hashes of what some columns of the index say of each row."""
    words = np.zeros(len(original), np.uint64)
    for first, table in original.tables(columns):
        own = words[first : first + table.num_rows]
        for name in columns:
            own[:] = _mixed(own, _hashed(table[name]))
    return words


def _hashed(column: pa.ChunkedArray) -> Words:
    if pa.types.is_string(column.type):
        encoded = column.combine_chunks().dictionary_encode()
        hashes = np.append(key_hashes(encoded.dictionary.to_pylist()), _NULL)
        indices = pc.fill_null(encoded.indices, len(hashes) - 1)
        return np.asarray(hashes[indices.to_numpy(zero_copy_only=False)], np.uint64)
    numbers = column.cast(pa.int64()).fill_null(0).to_numpy().view(np.uint64)
    return np.where(column.is_valid().to_numpy(), numbers, _NULL)


def _mixed(words: Words, more: Words) -> Words:
    mixed = (words ^ more) * _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


def _compare_rejected(found: Comparison, left: Original, right: Original, num_examples: int) -> None:
    """Compare the rejected rows by key and reason; a key may be there more than once."""
    one, other = _rejected(left), _rejected(right)
    for words, others, original in ((one, other, left), (other, one, right)):
        only = _only_in(words, others)
        if len(only):
            keys = tuple(_rejected_keys(original, only, num_examples))
            found.differences.append(Difference(f"rejected row(s) only in {original.root}", len(only), keys))


def _rejected(original: Original) -> Words:
    return np.concatenate([np.empty(0, np.uint64), *(_rejected_words(table) for table in original.rejected())])


def _rejected_words(table: pa.Table) -> Words:
    return _mixed(_mixed(np.zeros(table.num_rows, np.uint64), _hashed(table["key"])), _hashed(table["error"]))


def _only_in(words: Words, others: Words) -> Words:
    """Return what of `words` is not among `others`, or more often, as often as that is so."""
    values, counts = np.unique(words, return_counts=True)
    other_values, other_counts = np.unique(others, return_counts=True)
    at, there = find(other_values, values)
    in_others = np.where(there, other_counts[at], 0) if len(other_counts) else np.zeros(len(values), np.int64)
    return np.repeat(values, np.maximum(counts - in_others, 0))


def _rejected_keys(original: Original, words: Words, count: int) -> list[str]:
    keys: list[Any] = []
    for table in original.rejected():
        if len(keys) >= count:
            break
        keys += table["key"].filter(pa.array(np.isin(_rejected_words(table), words))).to_pylist()
    return [str(key) for key in keys[:count]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
