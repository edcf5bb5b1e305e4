"""The quality of captions: a row of measures for each, and what they are over a corpus.

`docs/statistics.md` has the table of measures, why each is worth having and what real captions score.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.measures import COUNTS, Counter
from pixart_data.openers import OpenerCounter, Openers
from pixart_data.tagging.blocks import TAGS, Block
from pixart_data.tagging.vocabulary import Vocabulary, hash_of

MEASURES = pa.schema(
    [
        ("num_tokens", pa.int32()),
        ("num_sentences", pa.int32()),
        ("num_nouns", pa.int32()),
        ("num_distinct_nouns", pa.int32()),  # in lower case
        ("distinct_share", pa.float32()),  # distinct nouns among nouns; null without nouns
        ("num_generic_nouns", pa.int32()),  # image, scene, side ...
        ("num_attributes", pa.int32()),  # adjectives, and participles inside noun phrases
        ("attributes_per_noun", pa.float32()),  # null without nouns
        ("num_noun_phrases", pa.int32()),  # runs of nouns
        ("num_attributed_phrases", pa.int32()),  # those with an attribute right before
        ("num_spatial", pa.int32()),  # spatial relations
        ("num_numbers", pa.int32()),  # CD
        ("num_hedges", pa.int32()),
        ("num_boilerplate", pa.int32()),  # sentences that begin with boilerplate
        ("repeated_share", pa.float32()),  # of the tokens, those in a run of four that was there before
        ("distinct_2", pa.float32()),  # distinct pairs of neighbours among pairs; null for a single token
        ("final_mark", pa.bool_()),  # ends in . ! ? or …, closing quotes and brackets aside
        ("truncated", pa.bool_()),
        ("refusal", pa.bool_()),  # a sentence begins as refusals do
        ("echo", pa.bool_()),  # repeats its prompt; null without a prompt
    ]
)
"""One row for each caption; all null for those that are null or blank."""

PROSE_TOKENS = 32
"""A caption this long is prose, which ends in a mark; a shorter one without may be a title or a list of words."""

ECHO_WORDS = 6
"""So many words of the prompt in a row are an echo of it; or all of a shorter prompt, down to three."""


@dataclass(frozen=True)
class Bins:
    """Bins from 0 on, the last one open above."""

    width: float
    count: int

    def fill(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return how many values fall into each; a share of 1 as stored has a bin of its own."""
        bins = np.floor(values.astype(np.float64) / self.width + _SLACK).astype(np.int64)
        return np.bincount(np.minimum(bins, self.count - 1), minlength=self.count).astype(np.int64)


HISTOGRAMS = {
    "num_tokens": Bins(10, 51),
    "num_sentences": Bins(1, 21),
    "num_nouns": Bins(2, 51),
    "num_distinct_nouns": Bins(2, 51),
    "distinct_share": Bins(0.05, 21),
    "attributes_per_noun": Bins(0.05, 31),
    "num_attributed_phrases": Bins(1, 31),
    "num_spatial": Bins(1, 31),
    "num_hedges": Bins(1, 16),
    "num_boilerplate": Bins(1, 16),
    "repeated_share": Bins(0.05, 21),
    "distinct_2": Bins(0.01, 101),
}
"""The measures of which a histogram is kept."""

_MILLIONTHS = 1_000_000  # sums of shares are whole numbers of these, so that no order of adding changes them
_SLACK = 1e-6  # 0.15 as a 32-bit float is a little more, 0.7 a little less
_DANGLING = ("DT", "IN", "CC", "TO", "PRP$", "WDT")
_LENGTH = "length"
_QUOTED = '(?s)".*"'
_FEWEST_WORDS = 3
_SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+")
_FINAL_MARKS = re.compile(r"[\s.!?:]+$")


class Inspector:
    """Measures captions; not to be shared between threads, as engines are not.

    Args:
        vocabulary: The engine's.
        with_openers: Count how sentences begin, too; what is counted stays in memory until `take_openers`.
    """

    def __init__(self, vocabulary: Vocabulary, with_openers: bool = True) -> None:
        self._counter = Counter(vocabulary)
        self._openers = OpenerCounter(vocabulary) if with_openers else None

    def measure(
        self,
        block: Block,
        prompts: pa.Array | pa.ChunkedArray | None = None,
        finish_reasons: pa.Array | pa.ChunkedArray | None = None,
    ) -> pa.RecordBatch:
        """Return a row of `MEASURES` for each caption of a block.

        Args:
            block: What the engine gave for the captions.
            prompts: What each was asked with. What a prompt quotes in "double quotes" is not counted as its own words:
                a caption may well repeat the raw caption that it was shown.
            finish_reasons: "length" where the caption was cut off.
        """
        counts = dict(zip(COUNTS, self._counter.count(block).T, strict=True))
        if self._openers is not None:
            self._openers.add(block)
        nouns, tokens = counts["num_nouns"], counts["num_tokens"]
        columns: dict[str, npt.NDArray[Any]] = {
            **counts,
            "distinct_share": _share(counts["num_distinct_nouns"], nouns),
            "attributes_per_noun": _share(counts["num_attributes"], nouns),
            "repeated_share": _share(counts["num_repeated_tokens"], tokens),
            "distinct_2": _share(counts["num_distinct_pairs"], tokens - 1),
            "final_mark": counts["final_mark"] > 0,
            "truncated": _is_truncated(counts, finish_reasons),
            "refusal": counts["num_refusals"] > 0,
        }
        absent = ~np.asarray(block.counted)
        arrays = [
            self._echo(block, prompts, absent) if field.name == "echo" else _column(columns[field.name], field, absent)
            for field in MEASURES
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=MEASURES)

    def take_openers(self) -> Openers:
        """Return how the sentences measured since the last time begin."""
        return Openers() if self._openers is None else self._openers.take()

    def _echo(self, block: Block, prompts: Any, absent: npt.NDArray[np.bool_]) -> pa.Array:
        if prompts is None or pa.types.is_null(prompts.type):
            return pa.nulls(len(block), pa.bool_())
        texts = pc.replace_substring_regex(_flat(prompts, pa.large_string()), _QUOTED, '"').dictionary_encode()
        words = [_prompt_words(text) for text in texts.dictionary.to_pylist()]
        ends = np.cumsum([0, *map(len, words)])
        runs = [min(ECHO_WORDS, len(word)) if len(word) >= _FEWEST_WORDS else 0 for word in words]
        spans = np.column_stack([ends[:-1], ends[1:], runs]).astype(np.int64)
        asked = texts.indices.is_valid().to_numpy(zero_copy_only=False)
        spans = np.vstack([spans, np.zeros((1, 3), np.int64)])
        of_caption = spans[np.where(asked, texts.indices.fill_null(0).to_numpy(zero_copy_only=False), len(words))]
        hashes = np.array([value for word in words for value in word], np.uint64)
        found = self._counter.find_echoes(block, hashes, np.ascontiguousarray(of_caption))
        return pa.array(found, mask=absent | ~asked)


@functools.lru_cache(maxsize=1024)
def _prompt_words(prompt: str) -> tuple[int, ...]:
    """Return the hashes of a prompt's tokens in lower case, the mark at its end aside.

    NLTK's word tokenizer takes single sentences and needs no data; prompts are plain enough to be cut after any mark.
    """
    from nltk.tokenize import NLTKWordTokenizer

    tokenize = NLTKWordTokenizer().tokenize
    sentences = _SENTENCE_GAP.split(_FINAL_MARKS.sub("", prompt))
    return tuple(int(hash_of(token.lower())) for sentence in sentences for token in tokenize(sentence))


def _is_truncated(counts: Mapping[str, npt.NDArray[Any]], finish_reasons: Any) -> npt.NDArray[np.bool_]:
    """Cut off by the limit; or without a final mark, and long enough for one or in the middle of a phrase."""
    dangles = np.isin(counts["last_tag"], [TAGS.index(tag) for tag in _DANGLING])
    unfinished = (counts["final_mark"] == 0) & ((counts["num_tokens"] >= PROSE_TOKENS) | dangles)
    if finish_reasons is None or pa.types.is_null(finish_reasons.type):
        return np.asarray(unfinished, np.bool_)
    cut = pc.equal(_flat(finish_reasons, pa.string()), _LENGTH).fill_null(False)
    return np.asarray(unfinished | cut.to_numpy(zero_copy_only=False), np.bool_)


def _flat(array: Any, kind: pa.DataType) -> pa.Array:
    return (array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array).cast(kind)


def _share(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Divide; NaN where there is nothing to divide by."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan).astype(np.float32)


def _column(values: npt.NDArray[Any], field: pa.Field, absent: npt.NDArray[np.bool_]) -> pa.Array:
    mask = absent | np.isnan(values) if values.dtype.kind == "f" else absent
    return pa.array(np.ascontiguousarray(values), field.type, mask=mask)


class Totals:
    """What the measures are over a corpus: means, shares and histograms; small, and exact however it is put together.

    Attributes:
        num_captions: Captions that were measured.
        num_empty: Null and blank ones, which were not.
        num_failed: Captions that fail the gate, empty ones included.
        failures: The same by failure; a caption may have several.
        openers: How sentences begin.
    """

    def __init__(self) -> None:
        self.num_captions = self.num_empty = self.num_failed = 0
        self.failures: dict[str, int] = {}
        self.openers = Openers()
        self._counts = dict.fromkeys(MEASURES.names, 0)
        self._sums = dict.fromkeys(MEASURES.names, 0)
        self._histograms = {name: np.zeros(bins.count, np.int64) for name, bins in HISTOGRAMS.items()}

    def add(self, batch: pa.RecordBatch, failures: pa.Array | None = None) -> None:
        """Add rows of `MEASURES`, and what `gates.failures` says of them; `openers` are the caller's to merge."""
        num_empty = batch["num_tokens"].null_count
        self.num_captions += len(batch) - num_empty
        self.num_empty += num_empty
        for name in MEASURES.names:
            values = batch[name].drop_null().to_numpy(zero_copy_only=False)
            scale = _MILLIONTHS if values.dtype.kind == "f" else 1
            self._counts[name] += len(values)
            self._sums[name] += int(np.rint(values.astype(np.float64) * scale).sum())
            if name in HISTOGRAMS:
                self._histograms[name] += HISTOGRAMS[name].fill(values)
        if failures is not None:
            self.num_failed += pc.sum(pc.greater(pc.list_value_length(failures), 0)).as_py() or 0
            for row in pc.value_counts(pc.list_flatten(failures)).to_pylist():
                self.failures[row["values"]] = self.failures.get(row["values"], 0) + row["counts"]

    def merge(self, other: Self) -> None:
        """Add the totals of other captions."""
        self.num_captions += other.num_captions
        self.num_empty += other.num_empty
        self.num_failed += other.num_failed
        self.openers.merge(other.openers)
        for name, count in other.failures.items():
            self.failures[name] = self.failures.get(name, 0) + count
        for name in MEASURES.names:
            self._counts[name] += other._counts[name]
            self._sums[name] += other._sums[name]
        for name in HISTOGRAMS:
            self._histograms[name] += other._histograms[name]

    def mean(self, name: str) -> float | None:
        """Return the mean of a measure, of a flag the share of captions; None where it was taken of none."""
        scale = _MILLIONTHS if pa.types.is_floating(MEASURES.field(name).type) else 1
        return self._sums[name] / self._counts[name] / scale if self._counts[name] else None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON: for each measure also its mean, and where its bins begin.

        A histogram's bin i holds values from `i * width` up to the next; the last is open above.
        """
        measures: dict[str, dict[str, Any]] = {}
        for name in MEASURES.names:
            measures[name] = {"mean": self.mean(name), "count": self._counts[name], "sum": self._sums[name]}
            if name in HISTOGRAMS:
                histogram = {"width": HISTOGRAMS[name].width, "counts": self._histograms[name].tolist()}
                measures[name]["histogram"] = histogram
        return {
            "num_captions": self.num_captions,
            "num_empty": self.num_empty,
            "num_failed": self.num_failed,
            "failures": dict(sorted(self.failures.items())),
            "measures": measures,
            "openers": self.openers.to_json(),
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        """Return the totals that `to_json` was made of."""
        totals = cls()
        totals.num_captions, totals.num_empty = facts["num_captions"], facts["num_empty"]
        totals.num_failed, totals.failures = facts["num_failed"], dict(facts["failures"])
        totals.openers = Openers.from_json(facts["openers"])
        for name, measure in facts["measures"].items():
            totals._counts[name], totals._sums[name] = measure["count"], measure["sum"]
            if name in HISTOGRAMS:
                totals._histograms[name] += np.array(measure["histogram"]["counts"], np.int64)
        return totals
