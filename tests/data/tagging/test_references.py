"""The engines in plain Python: NLTK's own answer, sentence by sentence, and TextBlob's lexicon."""

import pyarrow as pa
import pytest

from pixart_data.errors import DataError
from pixart_data.tagging.blocks import OTHER_TAG, TAGS
from pixart_data.tagging.references import NltkEngine, TextBlobEngine, well_formed

CAPTIONS = [
    "Two dogs chase a red ball across the wet grass. It is raining!",
    None,
    "Dr. Smith's dog isn't here; it ran to St. Paul.",
    " \n\t",
    "",
    "“The cat’s on the ‘mat’,” said Anna.\nThen 3 apples \0 fell.",
    "\U0001f600 東京 café",
]


def rows(engine, block):
    words = engine.vocabulary.surfaces(block.words).to_pylist()
    return [
        list(zip(words[start:stop], ([*TAGS, "?"][tag] for tag in block.tags[start:stop]), strict=True))
        for start, stop in zip(block.offsets, block.offsets[1:], strict=False)
    ]


@pytest.fixture(params=["nltk", "textblob"])
def engine(request):
    if request.param == "textblob":
        return TextBlobEngine()
    request.getfixturevalue("nltk_data")
    return NltkEngine()


def test_equals_nltk_called_by_hand(nltk_data):
    import nltk

    engine = NltkEngine()
    block = engine.tag(pa.array(CAPTIONS))
    expected = [nltk.pos_tag(nltk.word_tokenize(caption)) if (caption or "").strip() else [] for caption in CAPTIONS]
    assert rows(engine, block) == expected
    assert block.counted.tolist() == [True, False, True, False, False, True, True]
    assert len(block) == len(CAPTIONS)


def test_sentences_are_nltks(nltk_data):
    import nltk

    block = NltkEngine().tag(pa.array(CAPTIONS))
    starts = []
    for i, caption in enumerate(CAPTIONS):
        start = int(block.offsets[i])
        for sentence in nltk.sent_tokenize(caption or ""):
            starts.append(start)
            start += len(nltk.word_tokenize(sentence, preserve_line=True))
    assert block.begins.nonzero()[0].tolist() == starts
    assert len(starts) > 5


def test_the_lexicon_by_hand():
    engine = TextBlobEngine()
    block = engine.tag(pa.array(['A dog near the table. "A cat." Mr. Smith waits', None]))
    (tagged, nothing) = rows(engine, block)
    assert [word for word, tag in tagged if tag.startswith("NN")] == ["dog", "table", "cat", "Mr.", "Smith"]
    assert nothing == []
    assert block.begins.sum() == 3
    assert engine.approximate
    assert engine.name.startswith("textblob ")
    assert "(approximate)" in engine.name


def test_the_lexicon_gives_one_tag_of_several():
    engine = TextBlobEngine()
    block = engine.tag(pa.array([" ".join(f"{word} ," for word in ("Polish", "a", "that", "'s"))]))
    assert set(block.tags) <= set(range(OTHER_TAG + 1))
    assert OTHER_TAG not in block.tags


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_any_array_of_texts(engine, kind):
    texts = ["A red ball.", None, "", "Two cats"]
    expected = rows(engine, engine.tag(pa.array(texts)))
    array = pa.array(texts, kind)
    assert rows(engine, engine.tag(array)) == expected
    assert rows(engine, engine.tag(pa.chunked_array([array[:1], array[1:]]))) == expected
    assert rows(engine, engine.tag(pa.array(["x", *texts])[1:])) == expected


def test_nothing_in_nothing_out(engine):
    for array in (pa.nulls(2), pa.array([], pa.string())):
        block = engine.tag(array)
        assert (len(block), len(block.words), len(block.offsets)) == (len(array), 0, len(array) + 1)
        assert not block.counted.any()


def test_bytes_that_are_no_text_become_replacement_characters(engine):
    raw = pa.array([b"a cat \xff\xed\xa0\x80", b"a dog"])
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    mended = pa.array(["a cat \ufffd\ufffd\ufffd\ufffd", "a dog"])
    assert rows(engine, engine.tag(broken)) == rows(engine, engine.tag(mended))


@pytest.mark.parametrize("array", [pa.array([1, 2]), pa.array([b"a"]), pa.array([["a"]])])
def test_other_arrays_are_refused(engine, array):
    with pytest.raises(DataError, match=f"expected texts, found {array.type}".replace("[", r"\[")):
        engine.tag(array)


def test_surrogate_pairs_are_joined_and_lone_ones_replaced():
    assert well_formed("\ud83d\ude00 cat") == "\U0001f600 cat"
    assert well_formed("\ud83d cat \udfff") == "\ufffd cat \ufffd"
    assert well_formed("a \U0001f600 cat") == "a \U0001f600 cat"
