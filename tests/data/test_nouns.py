"""Counts of nouns: against plain Python on captions tagged by hand, merged in any order, and through Parquet."""

import sys
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data import lemmas, nouns
from pixart_data.errors import DataError
from pixart_data.nouns import (
    APPROXIMATE_DEFINITION,
    DEFINITION,
    THRESHOLD,
    VIEWS,
    Distinct,
    NounCounter,
    NounCounts,
    NounStats,
    definition,
    lowercase,
    summarise,
)
from pixart_data.records import NOUNS
from pixart_data.tagging.references import NltkEngine, TextBlobEngine
from pixart_data.tagging.vocabulary import Vocabulary
from tests.blocks import NAME, counted, nouns_of, occurrences
from tests.tokens import block_of

# fmt: off
WORDS = [
    "cat", "Cat", "CAT", "cats", "dog", "x-ray", "10", "|", "naïve", "Ångström", "ÅNGSTRÖM", "ΟΔΟΣ", "οδος", "οδοσ",
    "İstanbul", "i̇stanbul", "ǅ", "straße", "東京", "\0", "-", "a1",
]
# fmt: on
PAIRS = st.tuples(st.sampled_from(WORDS), st.sampled_from(["NN", "NNS", "NNP", "NNPS", "JJ", ".", "``"]))
CAPTIONS = st.lists(st.one_of(st.none(), st.lists(PAIRS, max_size=8)), max_size=12)


def rows(counts):
    """The table as a dict, and the rest of the facts."""
    columns = (counts.table[name].to_pylist() for name in NOUNS.names)
    table = {(surface, tag): tuple(figures) for surface, tag, *figures in zip(*columns, strict=True)}
    assert len(table) == counts.table.num_rows
    facts = (counts.tagger, counts.approximate, counts.num_captions, counts.num_empty)
    return table, facts, counts.per_caption.tolist()


def by_hand(captions):
    """What `rows` gives, in plain Python."""
    every, holding = occurrences(captions, lambda surface, tag: (surface, tag))
    firsts = Counter()
    for caption in nouns_of(captions):
        met = set()
        for pair in caption:
            if pair[0].lower() not in met:
                firsts[pair] += 1
            met.add(pair[0].lower())
    table = {pair: (count, holding[pair], firsts[pair]) for pair, count in every.items()}
    kept = nouns_of(captions)
    per_caption = [0] * 256
    for caption in kept:
        per_caption[len(caption)] += 1
    return table, (NAME, False, len(kept), len(captions) - len(kept)), per_caption


@given(CAPTIONS)
def test_counts_are_those_of_plain_python(captions):
    assert rows(counted(captions)) == by_hand(captions)


@settings(max_examples=30)
@given(st.lists(CAPTIONS, max_size=4))
def test_a_counter_starts_anew_after_each_unit_and_its_vocabulary_grows(units):
    vocabulary = Vocabulary()
    counter = NounCounter(NAME, False, vocabulary)
    for number, captions in enumerate(units):
        unit = [*captions, [(f"new{number}", "NN")]]
        for start in range(0, len(unit), 3):
            counter.add(block_of(unit[start : start + 3], vocabulary)[0])
        assert rows(counter.take()) == by_hand(unit)
    assert rows(counter.take()) == by_hand([])


def test_many_words_and_long_captions():
    """More than the arrays begin with: nouns, nouns in one caption, captions."""
    long = [(f"n{k % 9000}", "NN") for k in range(20_000)]
    captions = [long, [("n1", "NN"), ("N1", "NNP"), ("n1", "NN")], *[[(f"m{k}", "NNS")] for k in range(3000)]]
    counts = counted(captions)
    table, (_, _, num_captions, _), per_caption = rows(counts)
    assert len(table) == 9000 + 3000 + 1
    assert table["n1", "NN"] == (3 + 2, 2, 2)
    assert table["N1", "NNP"] == (1, 1, 0)
    assert (num_captions, per_caption[255], per_caption[3], per_caption[1]) == (3002, 1, 1, 3000)


@settings(max_examples=40)
@given(st.lists(CAPTIONS, min_size=1, max_size=5), st.integers(0, 4), st.sampled_from([0, 3, 1 << 20]))
def test_merging_is_counting_the_whole_however_it_is_grouped(parts, split, pending):
    counts = [counted(part) for part in parts]
    whole = by_hand([caption for part in parts for caption in part])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nouns, "_FEWEST_PENDING", pending)
        assert rows(counts[0].merge(iter(counts[1:]))) == whole
        left, right = counts[:split], counts[split:]
        grouped = [group[0].merge(group[1:]) for group in (left, right) if group]
        assert rows(grouped[-1].merge(grouped[:-1])) == whole
    assert [rows(count) for count in counts] == [by_hand(part) for part in parts]  # they stay as they were


def test_memory_of_merging_does_not_grow_with_the_parts(monkeypatch):
    monkeypatch.setattr(nouns, "_FEWEST_PENDING", 5000)
    held_bytes = []

    def parts():
        for _ in range(60):
            yield counted([[(f"noun{k}", "NN")] for k in range(2000)])
            held_bytes.append(pa.total_allocated_bytes())

    before_bytes = pa.total_allocated_bytes()
    merged = counted([]).merge(parts())
    assert merged.table.num_rows == 2000
    one_part_bytes = merged.table.nbytes
    assert max(held_bytes) - before_bytes < 20 * one_part_bytes


def test_merging_different_taggers_is_refused():
    with pytest.raises(
        DataError, match="expected all from one tagger, found nltk 3.10.4 and textblob 0.20.1; .* again"
    ):
        counted([], "nltk 3.10.4").merge([counted([], "textblob 0.20.1", approximate=True)])


def view_key(view):
    def is_letters(noun):
        kinds = [unicodedata.category(sign)[0] for sign in noun]
        return "L" in kinds and all(kind in "LM" or sign == "-" for kind, sign in zip(kinds, noun, strict=True))

    return {
        "lowercase": lambda surface, tag: surface.lower(),
        "surface": lambda surface, tag: surface,
        "letters": lambda surface, tag: surface.lower() if is_letters(surface.lower()) else None,
        "common": lambda surface, tag: surface.lower() if tag in ("NN", "NNS") else None,
    }[view]  # fmt: skip


@pytest.mark.parametrize("view", ["lowercase", "surface", "letters", "common"])
@settings(max_examples=40)
@given(captions=CAPTIONS, threshold=st.integers(0, 4))
def test_views_are_those_of_plain_python(view, captions, threshold):
    total, holding = occurrences(captions, view_key(view))
    counts = counted(captions)
    distinct = Distinct.of(counts, view)
    figures = dict(zip(distinct.nouns.to_pylist(), distinct.counts.tolist(), strict=True))
    assert figures == total
    held = dict(zip(distinct.nouns.to_pylist(), distinct.captions.tolist(), strict=True))
    if view in ("lowercase", "letters"):
        assert held == holding
    else:
        assert all(holding[noun] <= held[noun] <= min(total[noun], counts.num_captions) for noun in total)
    stats = summarise(counts, view, threshold)
    num_valid = sum(count > threshold for count in total.values())
    assert (stats.distinct_nouns, stats.valid_nouns, stats.total_nouns) == (len(total), num_valid, total.total())
    assert stats.vn_dn == (num_valid / len(total) if total else 0)
    assert stats.nouns_per_image == (total.total() / counts.num_captions if counts.num_captions else 0)
    assert (stats.view, stats.threshold, stats.tagger) == (view, threshold, NAME)
    assert distinct.top(3) == sorted(total.items(), key=lambda item: (-item[1], item[0]))[:3]


def test_threshold_is_more_than_ten():
    captions = [[("ten", "NN")]] * 10 + [[("eleven", "NN")]] * 11 + [[("Split", "NNP")]] * 5 + [[("split", "NN")]] * 6
    stats = summarise(counted([*captions, None]))
    assert THRESHOLD == stats.threshold == 10
    assert (stats.valid_nouns, stats.distinct_nouns, stats.total_nouns) == (2, 3, 32)
    assert (stats.num_captions, stats.num_empty, stats.nouns_per_image) == (32, 1, 1.0)


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_counted_gives_zeros(view):
    for counts in (counted([]), NounCounts("t", approximate=False), counted([[("red", "JJ")]])):
        stats = summarise(counts, view)
        assert (stats.vn_dn, stats.nouns_per_image, stats.distinct_nouns) == (0, 0, 0)
        assert Distinct.of(counts, view).top(5) == []
        assert rows(counts.merge([counts]))[0] == {}


def test_lower_case_is_that_of_python():
    """For every sign of Unicode, and words whose lower case depends on the place."""
    signs = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    words = [*signs, *WORDS, "ΑΣ", "ΑΣΑΣ", "Σ", "AΣ-", "A\u0345Σ", ""]
    assert lowercase(pa.array(words, pa.large_string())).to_pylist() == [word.lower() for word in words]
    assert lowercase(pa.array([], pa.large_string())).to_pylist() == []


def test_every_row_can_say_what_it_counts():
    exact, rough = counted([[("cat", "NN")]]), counted([[("cat", "NN")]], "textblob", approximate=True)
    assert definition(summarise(exact)) == DEFINITION
    assert definition(summarise(rough)) == APPROXIMATE_DEFINITION
    texts = [definition(summarise(exact, view, threshold)) for view in VIEWS for threshold in (5, 10)]
    assert len(set(texts)) == len(texts)
    assert all("pos_tag(word_tokenize(caption))" in text for text in texts)
    assert "more than 5 times" in texts[0]


def test_table_round_trip_through_parquet(tmp_path):
    captions = [[(word, "NN"), (word.upper(), "NNP"), (word, "NN")] for word in WORDS]
    counts = counted([*captions, None])
    pq.write_table(counts.to_table(), tmp_path / "nouns.parquet")
    table = pq.read_table(tmp_path / "nouns.parquet")
    assert table.schema.equals(NOUNS)
    pairs = list(zip(table["surface"].to_pylist(), table["tag"].to_pylist(), strict=True))
    assert pairs == sorted(pairs)
    assert rows(NounCounts.from_table(table)) == rows(counts)
    again = NounCounts.from_table(table).merge([counted([[("new", "NN")]])])
    assert (again.num_captions, again.num_empty) == (len(captions) + 1, 1)


def changed(table, **columns):
    for name, values in columns.items():
        table = table.set_column(
            NOUNS.get_field_index(name), NOUNS.field(name), pa.array(values, NOUNS.field(name).type)
        )
    return table


WHOLE = counted([[("cat", "NN"), ("cat", "NN")], [("dog", "NN")]]).to_table()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"key": ["a"]}), "expected columns surface, tag, count, captions, first_captions, found key"),
        (WHOLE.drop_columns(["captions", "first_captions"]), "found surface, tag, count; run `pixart stats` again"),
        (WHOLE.replace_schema_metadata(None), "metadata missing"),
        (WHOLE.replace_schema_metadata({"pixart.nouns": "{"}), "metadata missing or damaged"),
        (WHOLE.replace_schema_metadata({"pixart.nouns": "{}"}), "metadata missing or damaged"),
        (WHOLE.replace_schema_metadata({"pixart.nouns": "[]"}), "metadata missing or damaged"),
        (changed(WHOLE, count=[1, 1], captions=[2, 1]), "in more captions than it occurs"),
        (changed(WHOLE, count=[9, 1], captions=[3, 1]), "in more captions than there are"),
        (changed(WHOLE, first_captions=[-1, 1]), "in more captions than it occurs"),
        (changed(WHOLE, tag=["NN", "VB"]), "a tag is no noun's"),
        (changed(WHOLE, surface=["cat", None]), "a column has nulls"),
    ],
)
def test_foreign_and_damaged_tables_are_refused(table, message):
    with pytest.raises(DataError, match=message):
        NounCounts.from_table(table)


def test_metadata_that_does_not_add_up_is_refused():
    facts = WHOLE.schema.metadata[b"pixart.nouns"]
    table = WHOLE.replace_schema_metadata({b"pixart.nouns": facts.replace(b'"num_captions": 2', b'"num_captions": 3')})
    with pytest.raises(DataError, match="does not add up to the captions"):
        NounCounts.from_table(table)


def test_nouns_are_those_of_the_engine(nltk_data):
    """From texts: the engine's tags, counted, are NLTK's own nouns."""
    import nltk

    texts = ["Two dogs chase a red ball across the grass. A Cat and a cat sit.", None, "The Kitchen table.", " "]
    engine = NltkEngine()
    counter = NounCounter(engine.name, engine.approximate, engine.vocabulary)
    counter.add(engine.tag(pa.array(texts)))
    tagged = [nltk.pos_tag(nltk.word_tokenize(text)) if (text or "").strip() else None for text in texts]
    table, facts, per_caption = by_hand(tagged)
    assert rows(counter.take()) == (table, (engine.name, False, *facts[2:]), per_caption)
    assert len(table) > 2


def test_an_approximate_engine_marks_its_figures():
    engine = TextBlobEngine()
    counter = NounCounter(engine.name, engine.approximate, engine.vocabulary)
    counter.add(engine.tag(pa.array(["A cat sits on a table."])))
    stats = summarise(counter.take())
    assert (stats.approximate, stats.distinct_nouns) == (True, 2)
    assert "(approximate)" in stats.tagger
    assert isinstance(stats, NounStats)
    assert np.isclose(stats.nouns_per_image, 2)


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path):
    """NLTK as on a machine without WordNet."""
    from nltk.corpus.reader import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, "unused"))
    return tmp_path


def write_wordnet(folder, nouns, exceptions):
    """A WordNet in its own format, of nouns alone."""
    folder.mkdir(parents=True)
    for kind in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{kind}", f"{kind}.exc", f"data.{kind}"):
            (folder / name).write_text("")
    (folder / "data.adj").write_text("  1 WordNet 7.5 Copyright of nobody\n")
    (folder / "index.noun").write_text("".join(f"{noun} n 1 0 1 0 00000001  \n" for noun in nouns))
    (folder / "noun.exc").write_text("".join(f"{form} {noun}\n" for form, noun in exceptions.items()))
    for name in ("cntlist.rev", "lexnames", "index.sense"):
        (folder / name).write_text("")


LEMMA_CAPTIONS = [
    [("Cats", "NNS"), ("cats", "NNP"), ("cat", "NN"), ("Children", "NNPS"), ("children", "NN")],
    [("glass", "NN"), ("GLASSES", "NNS"), ("Mice", "NNP"), ("blorps", "NNS")],
]


def lemma_counts():
    distinct = Distinct.of(counted(LEMMA_CAPTIONS), "lemma")
    return dict(zip(distinct.nouns.to_pylist(), distinct.counts.tolist(), strict=True)), distinct.rule


def test_lemmas_without_wordnet_are_singulars_and_say_so(no_wordnet):
    figures, rule = lemma_counts()
    assert figures == {"cat": 2, "cats": 1, "child": 1, "children": 1, "glass": 2, "mice": 1, "blorp": 1}
    assert "TextBlob" in rule
    assert rule in definition(summarise(counted(LEMMA_CAPTIONS), "lemma"))


def test_a_lemma_whose_captions_went_to_another_of_its_surfaces_is_held_by_some(no_wordnet):
    distinct = Distinct.of(counted([[("Cats", "NN"), ("cats", "NNS")]] * 20), "lemma")
    assert set(distinct.nouns.to_pylist()) == {"cats", "cat"}
    assert distinct.captions.min() >= 1


def test_lemmas_with_wordnet_are_its_own_and_say_so(no_wordnet):
    folder = no_wordnet / "corpora" / "wordnet"
    write_wordnet(folder, ["cat", "child", "glass", "mouse"], {"children": "child", "mice": "mouse"})
    figures, rule = lemma_counts()
    assert figures == {"cat": 3, "child": 2, "glass": 2, "mouse": 1, "blorps": 1}
    assert rule == "lemmas of lower-cased surfaces by NLTK's WordNetLemmatizer and WordNet 7.5"
    assert rule in definition(summarise(counted(LEMMA_CAPTIONS), "lemma"))


def test_a_damaged_wordnet_is_as_none(no_wordnet):
    write_wordnet(no_wordnet / "corpora" / "wordnet", ["cat"], {})
    (no_wordnet / "corpora" / "wordnet" / "index.noun").write_text("cat n x\n")
    assert "TextBlob" in lemmas.find_lemmatizer().rule
