"""Nouns: equality with NLTK where its data is present, the labelled fallback where it is not."""

import json
import logging
import pickle
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.errors import ConfigError, DataError
from pixart_data.nouns import (
    NOUN_TAGS,
    THRESHOLD,
    NounCounts,
    build_tagger,
    count_nouns,
    find_tagger,
    summarise,
)
from pixart_data.records import NOUNS

SHARED = Path(__file__).parents[2].parent / "shared"
NLTK_DATA = SHARED / "nltk_data"
CAPTIONS = SHARED / "captions"

SENTENCES = [
    "Two dogs chase a red ball across the wet grass.",
    "Dr. Smith's dog isn't here. It ran to St. Paul, near the U.S. border!",
    "A woman in a blue coat (and hat) holds an umbrella; it's raining...",
    "“The cat’s on the ‘mat’,” said Anna — then she left.",
    "First line\nsecond line\n\nA third paragraph with 3 apples, 50% off & more.",
    "PHOTO | Vintage Poster / 24x36 in. <Framed> #art @home",
]
ODD = [
    "",
    " \n\t",
    "\0",
    "a\0cat \0",
    "\U0001f600 a dog \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ud800 a cat",
    "a cat \udfff\ud83d",
    "\ud83d\ude00 a cat",
    "\ufeffcat\u200b\u2028dog",
    "İstanbul ǅ ß",
    "the cat sat on a mat. " * 2300,
    "a" * 50_000,
    "." * 50_000,
    ". " * 25_000,
    '."' * 25_000,
    "'" * 50_000,
    " " * 50_000,
    "(" * 50_000,
    "Mr. " * 12_500,
    "-1,0" * 12_500,
]

needs_data = pytest.mark.skipif(not NLTK_DATA.is_dir(), reason="no NLTK data beside the repository")
needs_captions = pytest.mark.skipif(not CAPTIONS.is_dir(), reason="no captions beside the repository")


@pytest.fixture
def nltk_tagger(monkeypatch):
    if not NLTK_DATA.is_dir():
        pytest.skip("no NLTK data beside the repository")
    monkeypatch.setattr("nltk.data.path", [str(NLTK_DATA)])
    return find_tagger(download=False)


@pytest.fixture
def lexicon_tagger():
    return find_tagger(approximate=True)


@pytest.fixture
def without_data(monkeypatch, tmp_path):
    """NLTK finds nothing on disk, and no network call is made unless a test allows one."""
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])

    def unreachable(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("nltk.download", lambda *args, **kwargs: pytest.fail("downloaded without asking"))


def read_captions(name, num_captions):
    captions = pq.read_table(CAPTIONS / f"{name}.parquet")["caption"].to_pylist()
    return random.Random(0).sample(captions, min(num_captions, len(captions)))


def reference(caption):
    import nltk

    return [(surface, tag) for surface, tag in nltk.pos_tag(nltk.word_tokenize(caption)) if tag in NOUN_TAGS]


def test_import_is_light():
    code = "import sys, pixart_data.nouns; sys.exit(bool({'nltk', 'textblob'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("sentence", SENTENCES)
def test_equals_nltk_on_own_sentences(nltk_tagger, sentence):
    assert nltk_tagger.nouns(sentence) == reference(sentence)


@needs_captions
@pytest.mark.parametrize(
    ("name", "low", "high"), [("llava_coco", 23, 26), ("laion_alt_text", 5.8, 6.8), ("vlm_other", 25, 29)]
)
def test_equals_nltk_on_real_captions(nltk_tagger, name, low, high):
    captions = read_captions(name, 150 if name != "laion_alt_text" else 1500)
    counts = count_nouns(captions, nltk_tagger)
    assert counts.table == Counter(noun for caption in captions for noun in reference(caption))
    assert low < summarise(counts).nouns_per_image < high


@needs_captions
@pytest.mark.parametrize(("name", "size"), [("llava_coco", 150), ("laion_alt_text", 1500)])
def test_approximate_mode_stays_near_nltk(nltk_tagger, lexicon_tagger, name, size):
    captions = read_captions(name, size)
    exact = summarise(count_nouns(captions, nltk_tagger))
    rough = summarise(count_nouns(captions, lexicon_tagger))
    assert rough.nouns_per_image == pytest.approx(exact.nouns_per_image, rel=0.04)
    assert rough.distinct_nouns == pytest.approx(exact.distinct_nouns, rel=0.16)


def test_counts_by_hand_with_nltk(nltk_tagger):
    counts = count_nouns(["The dog saw two dogs.", "Anna has a Dog", None, "", " \n"], nltk_tagger)
    assert counts.table == {("dog", "NN"): 1, ("dogs", "NNS"): 1, ("Anna", "NNP"): 1, ("Dog", "NNP"): 1}
    stats = summarise(counts)
    assert (counts.num_captions, counts.num_empty) == (2, 3)
    assert (stats.total_nouns, stats.distinct_nouns, stats.valid_nouns) == (4, 3, 0)
    assert stats.nouns_per_image == 2.0
    assert stats.top_nouns == (("dog", 2), ("anna", 1), ("dogs", 1))
    assert not stats.approximate


def test_counts_by_hand_with_the_lexicon(lexicon_tagger):
    counts = count_nouns(
        ["The cat sat on the mat. Two cats sleep.", "A table and two chairs", None, "  "], lexicon_tagger
    )
    assert counts.table == {
        ("cat", "NN"): 1,
        ("mat", "NN"): 1,
        ("cats", "NNS"): 1,
        ("table", "NN"): 1,
        ("chairs", "NNS"): 1,
    }
    assert (counts.num_captions, counts.num_empty) == (2, 2)
    assert summarise(counts).nouns_per_image == 2.5


def test_the_lexicon_splits_sentences(lexicon_tagger):
    surfaces = [surface for surface, _ in lexicon_tagger.nouns('A dog near the table. "A cat." Mr. Smith waits')]
    assert surfaces == ["dog", "table", "cat", "Mr.", "Smith"]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("kind", ["nltk", "textblob"])
def test_odd_input(request, kind, text):
    tagger = request.getfixturevalue("nltk_tagger" if kind == "nltk" else "lexicon_tagger")
    counts = count_nouns([text, None], tagger)
    assert counts.num_captions + counts.num_empty == 2
    assert counts.num_empty == (2 if not text.strip() else 1)
    assert NounCounts.from_table(counts.to_table()) == counts
    json.dumps(summarise(counts).top_nouns, ensure_ascii=False).encode()


def test_surrogate_pairs_are_joined_and_lone_ones_replaced(lexicon_tagger):
    assert lexicon_tagger.nouns("\ud83d\ude00 cat") == lexicon_tagger.nouns("\U0001f600 cat")
    assert lexicon_tagger.nouns("\ud83d cat") == lexicon_tagger.nouns("\ufffd cat")


def test_falls_back_when_offline(without_data, caplog):
    with caplog.at_level(logging.WARNING, logger="pixart_data.nouns"):
        tagger = find_tagger()
    assert tagger.kind == "textblob"
    assert tagger.approximate
    assert "(approximate)" in tagger.name
    (record,) = caplog.records
    assert "averaged_perceptron_tagger_eng" in record.message
    assert "python -m nltk.downloader averaged_perceptron_tagger_eng punkt_tab" in record.message
    assert "unreachable" in record.message
    assert summarise(count_nouns(["a cat"], tagger)).approximate


def test_falls_back_when_the_download_fails_quietly(without_data, monkeypatch, caplog, capfd):
    def failing(name, *, quiet, prefix, print_error_to):
        assert quiet
        print_error_to.write(f"{prefix}Error loading {name}:\n    no route")
        return False

    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
    monkeypatch.setattr("nltk.download", failing)
    assert find_tagger().kind == "textblob"
    assert "Error loading averaged_perceptron_tagger_eng: no route" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_a_download_makes_the_data_usable(without_data, monkeypatch):
    if not NLTK_DATA.is_dir():
        pytest.skip("no NLTK data beside the repository")
    asked = []

    def downloading(name, **kwargs):
        import nltk.data

        asked.append(name)
        nltk.data.path.append(str(NLTK_DATA))
        return True

    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
    monkeypatch.setattr("nltk.download", downloading)
    tagger = find_tagger()
    assert asked == ["averaged_perceptron_tagger_eng", "punkt_tab"]
    assert (tagger.kind, tagger.approximate) == ("nltk", False)


def test_no_download_unless_asked(without_data, caplog):
    assert find_tagger(download=False).kind == "textblob"
    assert "download failed" not in caplog.text


def test_a_worker_without_data_stops_instead_of_mixing_taggers(without_data):
    with pytest.raises(ConfigError, match="found no averaged_perceptron_tagger_eng and no punkt_tab"):
        build_tagger("nltk")


@needs_data
def test_damaged_data_is_an_error_and_no_fallback(tmp_path):
    """In a process of its own: NLTK keeps a loaded model."""
    taggers = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    taggers.mkdir(parents=True)
    (tmp_path / "tokenizers").symlink_to(NLTK_DATA / "tokenizers")
    code = (
        "import nltk.data, pixart_data.nouns, pixart_data.errors\n"
        f"nltk.data.path[:] = [{str(tmp_path)!r}, {str(NLTK_DATA)!r}]\n"
        "try: pixart_data.nouns.find_tagger(download=False)\n"
        "except pixart_data.errors.DataError as error: assert 'damaged' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_taggers_travel_between_processes(lexicon_tagger):
    copy = pickle.loads(pickle.dumps(lexicon_tagger))
    assert copy == lexicon_tagger == build_tagger(copy.kind)
    assert len(pickle.dumps(lexicon_tagger)) < 200
    assert copy.nouns("a cat") == [("cat", "NN")]


def test_merge_equals_counting_everything(lexicon_tagger):
    parts = [SENTENCES[:2], [None, *SENTENCES[2:4], ""], [], SENTENCES[3:]]
    merged = count_nouns([], lexicon_tagger)
    for part in parts:
        assert merged.merge(count_nouns(part, lexicon_tagger)) is merged
    whole = count_nouns([caption for part in parts for caption in part], lexicon_tagger)
    assert merged == whole
    assert summarise(merged) == summarise(whole)
    assert merged.to_table().equals(whole.to_table())


def test_merging_different_taggers_is_refused():
    with pytest.raises(DataError, match="expected all from one tagger"):
        NounCounts("nltk 3.10.4", approximate=False).merge(NounCounts("textblob 0.20.1", approximate=True))


def test_threshold_is_more_than_ten():
    assert THRESHOLD == 10
    table = Counter({("ten", "NN"): 10, ("eleven", "NN"): 11, ("Split", "NNP"): 5, ("split", "NN"): 6})
    stats = summarise(NounCounts("t", approximate=False, num_captions=4, table=table))
    assert (stats.valid_nouns, stats.distinct_nouns, stats.total_nouns) == (2, 3, 32)
    assert stats.vn_dn == pytest.approx(2 / 3)
    assert stats.nouns_per_image == 8.0
    assert stats.top_nouns == (("eleven", 11), ("split", 11), ("ten", 10))


def test_nothing_counted_gives_zeros():
    stats = summarise(NounCounts("t", approximate=False))
    assert (stats.vn_dn, stats.nouns_per_image, stats.distinct_nouns) == (0, 0, 0)


def test_table_round_trip_through_parquet(lexicon_tagger, tmp_path):
    counts = count_nouns([*SENTENCES, None], lexicon_tagger)
    pq.write_table(counts.to_table(), tmp_path / "nouns.parquet")
    table = pq.read_table(tmp_path / "nouns.parquet")
    assert table.schema.equals(NOUNS)
    assert table.column("surface").to_pylist() == sorted(table.column("surface").to_pylist())
    assert NounCounts.from_table(table) == counts


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"key": ["a"]}), "expected columns surface, tag, count"),
        (pa.table([[], [], []], schema=NOUNS), "metadata missing"),
        (pa.table([[], [], []], schema=NOUNS.with_metadata({"pixart.nouns": "{"})), "metadata missing or damaged"),
        (pa.table([[], [], []], schema=NOUNS.with_metadata({"pixart.nouns": "{}"})), "metadata missing or damaged"),
    ],
)
def test_foreign_tables_are_refused(table, message):
    with pytest.raises(DataError, match=message):
        NounCounts.from_table(table)
