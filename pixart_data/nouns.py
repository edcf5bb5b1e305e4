"""Noun statistics of captions, as in Table 1 of the PixArt-alpha paper.

Definition. A noun is a token that `pos_tag(word_tokenize(caption))` of the installed NLTK tags NN, NNS, NNP or NNPS:
original-case text, one caption at a time. Counts are kept for each (surface, tag), so that every way to tell distinct
nouns (DN) apart, a view, and every threshold of valid nouns (VN) is a query on one table. The paper names NLTK and the
threshold, more than 10 times; the tokeniser and the folding of case are choices made here.

With TextBlob's lexicon instead of NLTK, averages differ by up to about 3% and DN by up to about 13%, so counts of the
two are never merged and its figures are marked.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.errors import DataError
from pixart_data.lemmas import find_lemmatizer
from pixart_data.records import NOUNS
from pixart_data.tagging.blocks import NOUN_TAGS, Block
from pixart_data.tagging.tallies import MOST_NOUNS, clear, no_tallies, reserve, tally
from pixart_data.tagging.vocabulary import Vocabulary

View = Literal["lowercase", "surface", "lemma", "letters", "common"]
VIEWS: tuple[View, ...] = get_args(View)
THRESHOLD = 10

_METADATA = b"pixart.nouns"
_FIGURES = ("count", "captions", "first_captions")
_FEWEST_PENDING = 1 << 20  # rows that merging gathers before it adds them up
_COMMON_TAGS = ("NN", "NNS")
_PLURAL_TAGS = ("NNS", "NNPS")
_LETTERS = r"^[\p{L}\p{M}-]*\p{L}[\p{L}\p{M}-]*$"
_TAGGED = "tagged NN, NNS, NNP or NNPS, one caption at a time, in its original case."
_NOUN = f"A noun is a token of NLTK's pos_tag(word_tokenize(caption)) {_TAGGED}"
_APPROXIMATE_NOUN = f"Approximate: a noun is a token (NLTK's word tokenizer) by TextBlob's lexicon {_TAGGED}"
_DISTINCT = (
    "Distinct nouns (DN) are {rule}; valid nouns (VN) are distinct nouns that appear more than {threshold} times."
)
_RULES: dict[View, str] = {
    "lowercase": "lower-cased surfaces",
    "surface": "surfaces as they are written",
    "letters": "lower-cased surfaces of letters and hyphens only",
    "common": "lower-cased surfaces tagged NN or NNS",
}
DEFINITION = f"{_NOUN} {_DISTINCT.format(rule=_RULES['lowercase'], threshold=THRESHOLD)}"
APPROXIMATE_DEFINITION = f"{_APPROXIMATE_NOUN} {_DISTINCT.format(rule=_RULES['lowercase'], threshold=THRESHOLD)}"


def no_nouns() -> pa.Table:
    """Return a table of counts without a row."""
    return NOUNS.empty_table()


def no_captions() -> npt.NDArray[np.int64]:
    """Return a histogram of nouns per caption without a caption."""
    return np.zeros(MOST_NOUNS + 1, np.int64)


@dataclass(eq=False)
class NounCounts:
    """What counting has found; counts of parts merge into the counts of the whole.

    Attributes:
        tagger: Name of the engine.
        num_captions: Captions counted; the denominator of nouns per image.
        num_empty: Null or blank captions, left out of `num_captions`.
        table: A row for each (surface, tag) that occurs, of schema `NOUNS`, in no particular order.
        per_caption: At k, the captions with k nouns; the last, 255, stands for "or more", (256,).
    """

    tagger: str
    approximate: bool
    num_captions: int = 0
    num_empty: int = 0
    table: pa.Table = field(default_factory=no_nouns)
    per_caption: npt.NDArray[np.int64] = field(default_factory=no_captions)

    def merge(self, others: Iterable["NounCounts"]) -> "NounCounts":
        """Return the counts of this and all others, exactly what counting their captions together gives.

        Others are read one at a time and added up a few at a time: memory depends on the number of distinct nouns and
        on the largest of the parts, not on the number of parts. So let `others` be a generator that reads them.

        Raises:
            DataError: If two come from different taggers.
        """
        total = NounCounts(self.tagger, self.approximate, self.num_captions, self.num_empty)
        total.per_caption = self.per_caption.copy()
        tables, num_pending = [self.table], 0
        for other in others:
            require_one_tagger([self, other])
            total.num_captions += other.num_captions
            total.num_empty += other.num_empty
            total.per_caption += other.per_caption
            tables.append(other.table)
            num_pending += other.table.num_rows
            if num_pending > max(tables[0].num_rows, _FEWEST_PENDING):
                tables, num_pending = [_added(tables)], 0
        total.table = tables[0] if len(tables) == 1 else _added(tables)
        return total

    def to_table(self) -> pa.Table:
        """Return the counts in the schema `NOUNS`, sorted; what is not a column travels as schema metadata."""
        facts = {
            "tagger": self.tagger,
            "approximate": self.approximate,
            "num_captions": self.num_captions,
            "num_empty": self.num_empty,
            "per_caption": self.per_caption.tolist(),
        }
        table = self.table.sort_by([("surface", "ascending"), ("tag", "ascending")])
        return table.replace_schema_metadata({_METADATA: json.dumps(facts).encode()})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back what `to_table` made.

        Raises:
            DataError: If the table is another one, has lost its metadata, or holds what no counting gives.
        """
        if not table.schema.equals(NOUNS):
            raise DataError(
                f"noun counts: expected columns {', '.join(NOUNS.names)}, found {', '.join(table.schema.names)}; "
                "run `pixart stats` again"
            )
        try:
            facts = json.loads((table.schema.metadata or {})[_METADATA])
            facts["per_caption"] = np.array(facts["per_caption"], np.int64)
            counts = cls(**facts, table=table.replace_schema_metadata(None))
            _check(counts)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"noun counts: metadata missing or damaged ({error}); run `pixart stats` again") from error
        return counts


def require_one_tagger(counts: Iterable[NounCounts]) -> None:
    """Make sure that figures may be added up or compared.

    Raises:
        DataError: If they come from different taggers.
    """
    names = list(dict.fromkeys(count.tagger for count in counts))
    if len(names) > 1:
        raise DataError(
            f"noun counts: expected all from one tagger, found {names[0]} and {names[1]}; "
            "their figures do not compare: count again with one of them"
        )


class NounCounter:
    """Counts the nouns of blocks, for one unit of work after another.

    Args:
        engine_name: Name of the engine that makes the blocks, see `tagging.blocks.Engine`.
        vocabulary: The engine's.
    """

    def __init__(self, engine_name: str, approximate: bool, vocabulary: Vocabulary) -> None:
        self._name = engine_name
        self._approximate = approximate
        self._vocabulary = vocabulary
        self._tallies = no_tallies()
        self._num_empty = 0

    def add(self, block: Block) -> None:
        """Count a block of the engine whose vocabulary this is."""
        longest = int(np.diff(block.offsets).max(initial=0))
        tallies = reserve(self._tallies, len(self._vocabulary), len(block.words), longest)
        tally(tallies, block.words, block.tags, block.offsets, block.counted, self._vocabulary.folded())
        self._tallies = tallies
        self._num_empty += len(block) - int(np.count_nonzero(block.counted))

    def take(self) -> NounCounts:
        """Return what was counted since the last time, and start anew."""
        tallies = self._tallies
        num_rows, num_captions = tallies.state.tolist()
        words, tags = np.divmod(tallies.pairs[:num_rows], len(NOUN_TAGS))
        columns = [self._vocabulary.surfaces(words), pa.array(NOUN_TAGS).take(pa.array(tags))]
        figures = [pa.array(tallies.figures[:num_rows, i].copy()) for i in range(len(_FIGURES))]
        counts = NounCounts(
            self._name,
            self._approximate,
            num_captions,
            self._num_empty,
            pa.table([*columns, *figures], schema=NOUNS),
            tallies.per_caption.copy(),
        )
        clear(tallies)
        self._num_empty = 0
        return counts


@dataclass(frozen=True)
class NounStats:
    """One row of the paper's Table 1.

    Attributes:
        vn_dn: Valid over distinct nouns, 0 to 1. It grows with the number of captions.
        threshold: A noun is valid that appears more often.
        view: What makes two nouns the same, or leaves them out.
        rule: The same in words: what distinct nouns are.
    """

    num_captions: int
    num_empty: int
    distinct_nouns: int
    valid_nouns: int
    vn_dn: float
    total_nouns: int
    nouns_per_image: float
    approximate: bool
    tagger: str
    threshold: int = THRESHOLD
    view: View = "lowercase"
    rule: str = _RULES["lowercase"]


@dataclass(frozen=True, eq=False)
class Distinct:
    """The distinct nouns of a view, in no particular order.

    Attributes:
        nouns: Of type large_string, (V,).
        counts: How often each occurs, (V,).
        captions: How many captions hold it, (V,). Exact for the views "lowercase" and "letters". The others merge
            rows that one caption may hold several of ("cat" and "cats"), and the sum, which is capped at the number of
            captions, counts that caption several times.
        rule: What makes two nouns the same, in words.
        source: What was counted.
    """

    nouns: pa.Array
    counts: npt.NDArray[np.int64]
    captions: npt.NDArray[np.int64]
    view: View
    rule: str
    source: NounCounts

    @classmethod
    def of(cls, counts: NounCounts, view: View = "lowercase") -> "Distinct":
        """Query a view of counts; at some million nouns it takes seconds."""
        table, rule = counts.table, _RULES.get(view, "")
        if view == "common":
            table = table.filter(_tagged(table, _COMMON_TAGS))
        nouns = _flat(table["surface"])
        if view != "surface":
            nouns = lowercase(nouns)
        if view == "letters":
            kept = pc.match_substring_regex(nouns, _LETTERS)
            nouns, table = nouns.filter(kept), table.filter(kept)
        if view == "lemma":
            lemmatizer = find_lemmatizer()
            nouns, rule = lemmatizer(nouns, _tagged(table, _PLURAL_TAGS)), lemmatizer.rule
        held = table["captions" if view in ("surface", "common") else "first_captions"]
        encoded = nouns.dictionary_encode()
        count, captions = (_summed(encoded, column) for column in (table["count"], held))
        captions = np.clip(captions, 1, counts.num_captions)  # a lemma may have lost all to another of its surfaces
        return cls(encoded.dictionary, count, captions, view, rule, counts)

    def stats(self, threshold: int = THRESHOLD) -> NounStats:
        """Derive the paper's figures; ratios over nothing are 0."""
        total = int(self.counts.sum())
        num_valid = int(np.count_nonzero(self.counts > threshold))
        return NounStats(
            num_captions=self.source.num_captions,
            num_empty=self.source.num_empty,
            distinct_nouns=len(self.nouns),
            valid_nouns=num_valid,
            vn_dn=num_valid / max(len(self.nouns), 1),
            total_nouns=total,
            nouns_per_image=total / max(self.source.num_captions, 1),
            approximate=self.source.approximate,
            tagger=self.source.tagger,
            threshold=threshold,
            view=self.view,
            rule=self.rule,
        )

    def top(self, num_nouns: int) -> list[tuple[str, int]]:
        """Return the most frequent nouns with their counts, most frequent first, then by code points."""
        table = pa.table({"noun": self.nouns, "count": self.counts})
        rows = pc.select_k_unstable(table, num_nouns, [("count", "descending"), ("noun", "ascending")])
        best = table.take(rows)
        return list(zip(best["noun"].to_pylist(), best["count"].to_pylist(), strict=True))


def definition(stats: NounStats) -> str:
    """Return what the figures of a row count, in words, for every output that shows them."""
    noun = _APPROXIMATE_NOUN if stats.approximate else _NOUN
    return f"{noun} {_DISTINCT.format(rule=stats.rule, threshold=stats.threshold)}"


def summarise(counts: NounCounts, view: View = "lowercase", threshold: int = THRESHOLD) -> NounStats:
    """Derive the paper's figures from counts; ratios over nothing are 0."""
    return Distinct.of(counts, view).stats(threshold)


def lowercase(nouns: pa.Array) -> pa.Array:
    """Lower the case exactly as `str.lower` does.

    Arrow's own `utf8_lower` maps sign by sign, without the final sigma and the dotted capital I of Unicode's rules.
    """
    plain = pc.string_is_ascii(nouns)
    lower = pc.ascii_lower(nouns)
    odd = pc.invert(plain)
    given = nouns.filter(odd).to_pylist()
    return pc.replace_with_mask(lower, odd, pa.array([noun.lower() for noun in given], nouns.type)) if given else lower


def _check(counts: NounCounts) -> None:
    """Raise ValueError where metadata and columns are not what one counting gives."""
    if counts.per_caption.shape != (MOST_NOUNS + 1,) or counts.per_caption.sum() != counts.num_captions:
        raise ValueError("the histogram of nouns per caption does not add up to the captions")
    table = counts.table
    if any(table[name].null_count for name in NOUNS.names):
        raise ValueError("a column has nulls")
    if not pc.all(pc.is_in(table["tag"], pa.array(NOUN_TAGS)), min_count=0).as_py():
        raise ValueError("a tag is no noun's")
    count, captions, first = (table[name].to_numpy() for name in _FIGURES)
    if not ((first >= 0) & (first <= captions) & (captions >= 1) & (captions <= count)).all():
        raise ValueError("a noun is in more captions than it occurs")
    if captions.max(initial=0) > counts.num_captions:
        raise ValueError("a noun is in more captions than there are")


def _tagged(table: pa.Table, tags: tuple[str, ...]) -> pa.Array:
    return _flat(pc.is_in(table["tag"], pa.array(tags)))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    flat = column.combine_chunks()
    return pa.concat_arrays(flat.chunks) if isinstance(flat, pa.ChunkedArray) else flat


def _summed(encoded: pa.DictionaryArray, column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Add up a column by the values of a dictionary array, in the order of its dictionary."""
    sums = np.zeros(len(encoded.dictionary), np.int64)
    np.add.at(sums, encoded.indices.to_numpy(), column.to_numpy())
    return sums


def _added(tables: list[pa.Table]) -> pa.Table:
    """Add up tables of schema `NOUNS`: one row for each (surface, tag).

    Encoding the surfaces and adding by their numbers takes less time and memory than pyarrow's `group_by`.
    """
    table = pa.concat_tables(tables)
    encoded = _flat(table["surface"]).dictionary_encode()
    tags = _flat(pc.index_in(table["tag"], pa.array(NOUN_TAGS))).to_numpy()
    pairs = encoded.indices.to_numpy().astype(np.int64) * len(NOUN_TAGS) + tags
    held = np.zeros(len(encoded.dictionary) * len(NOUN_TAGS), np.bool_)
    held[pairs] = True
    present = np.flatnonzero(held)
    sums = []
    for name in _FIGURES:
        every = np.zeros(len(held), np.int64)
        np.add.at(every, pairs, table[name].to_numpy())
        sums.append(every[present])
    surfaces = encoded.dictionary.take(pa.array(present // len(NOUN_TAGS)))
    return pa.table([surfaces, pa.array(NOUN_TAGS).take(pa.array(present % len(NOUN_TAGS))), *sums], schema=NOUNS)
