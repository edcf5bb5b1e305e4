"""The benchmark of counting: its captions, that it compares before it times, and that it holds its limits."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import corpora, count_nouns, counting
from benchmarks.corpora import ALT_TEXT, DENSE, Zipf
from benchmarks.count_nouns import LIMITS, memory_line
from pixart_data.tagging.proof import CAPTIONS as PROOF


def rates(nltk, cold, warm):
    return {"nltk": nltk, "cold": cold, "warm": warm}


def found(dense=(30.0, 300.0), alt_text=(20.0, 200.0)):
    """Rates of two rounds in captions per second, as multiples of NLTK's."""
    sets = {DENSE: dense, ALT_TEXT: alt_text}
    return {name: (rates([10, 20], [c * 10, c * 20], [w * 10, w * 20]), 1000, 9000) for name, (c, w) in sets.items()}


def test_made_up_captions_are_of_both_kinds(tmp_path):
    made = corpora.load(tmp_path / "none")
    assert {name: len(captions) for name, captions in made.items()} == {DENSE: 1750, ALT_TEXT: 5000}
    assert made == corpora.load(tmp_path / "none")
    dense, alt_texts = (Counter(" ".join(captions.to_pylist()).split()) for captions in made.values())
    assert dense.total() / 1750 > 50
    assert len(dense) < 200
    assert len(alt_texts) > 10_000


def test_words_of_the_stream_are_distinct_and_spread_by_zipfs_law():
    num_words = 70_000
    words = corpora._spelled(num_words).to_pylist()
    assert len(set(words)) == num_words
    assert all(word.isalpha() and word.isascii() for word in words)
    stream = Zipf(num_words)
    captions = [*stream.captions(3000).to_pylist(), *stream.captions(3000).to_pylist()]
    assert len(set(captions)) == 6000
    counts = Counter(" ".join(captions).split())
    assert counts.total() == 60_000
    assert set(counts) <= set(words)
    assert counts[words[0]] / counts[words[9]] == pytest.approx(7.3, rel=0.3)  # ln(2) / ln(1.1)


def test_both_sides_count_the_same(nltk_data):
    captions = pa.array(["Two dogs chase a red ball.", None, "It's Anna's cat on the table, isn't it?", ""])
    ours = counting.Ours()
    ours.add(captions)
    ours.add(captions)
    expected = counting.count_by_nltk(captions.to_pylist() * 2)
    assert expected
    assert ours.counts() == expected
    assert ours.counts() == Counter()


def test_counts_that_differ_are_no_basis_for_times():
    with pytest.raises(RuntimeError, match=r"\('a', 'NN'\): expected the count 2 of NLTK, found 1"):
        count_nouns._require_equal(Counter({("a", "NN"): 2}), Counter({("a", "NN"): 1}))
    with pytest.raises(RuntimeError, match="expected the count 0"):
        count_nouns._require_equal(Counter(), Counter({("a", "NN"): 1}))


def test_an_engine_in_plain_python_is_not_timed_as_ours(synthetic_nltk_data, monkeypatch):
    monkeypatch.setattr("pixart_data.tagging.engines.NLTK_VERSIONS", frozenset({"0.1"}))
    with pytest.raises(RuntimeError, match="expected the compiled engine"):
        counting.Ours()


def test_ratios_are_taken_inside_rounds():
    assert count_nouns.ratio(rates([1, 10, 100], [2, 50, 300], []), "cold") == (3, 2, 5)


def test_limits_are_held():
    assert set(LIMITS.values()) == {250, 20, 100, 10}
    assert not count_nouns.missed(found())
    assert count_nouns.missed(found(dense=(30.0, 249.0)))
    assert count_nouns.missed(found(alt_text=(9.9, 200.0)))
    text = count_nouns.table(found(dense=(19.0, 300.0)))
    lines = {line.split("  ")[0]: line for line in text.splitlines()[1:]}
    assert "19.0 (19.0..19.0) MISSED" in lines[f"{DENSE}, cold*"]
    assert "300.0 (300.0..300.0) PASS" in lines[f"{DENSE}, warm"]
    assert lines[f"{DENSE}, warm"].split()[3:5] == ["4,500", "0.041"]
    assert f"* an engine that has met the {len(PROOF)} captions of its proof" in text


def peak_of(size_bytes):
    figures = {"num_words": 5, "num_rows": 4, "rate": 1.0, "merge_s": 1.0}
    return {**figures, "peak_bytes": size_bytes, "merging_bytes": 300_000_000}


def test_memory_is_judged_at_the_size_of_its_limit_alone():
    assert "peak 2.00 GB, 0.30 of it for merging (below 2 for 10,000,000): PASS;" in memory_line(
        10_000_000, peak_of(1_999_999_999)
    )
    assert "): MISSED;" in memory_line(10_000_000, peak_of(2_000_000_000))
    for size, peak_bytes in ((2_000_000, 10**9), (9_999_999, 3 * 10**9), (20_000_000, 3 * 10**9)):
        assert "): not judged at this size;" in memory_line(size, peak_of(peak_bytes))


@pytest.mark.parametrize(
    ("size", "peak_bytes", "code"), [(10_000_000, 10**9, 0), (10_000_000, 3 * 10**9, 1), (2_000_000, 3 * 10**9, 0)]
)
def test_the_exit_code_is_that_of_limits_judged(monkeypatch, capsys, size, peak_bytes, code):
    monkeypatch.setattr(count_nouns, "load", lambda: {})
    monkeypatch.setattr(count_nouns, "LIMITS", {})
    monkeypatch.setattr(counting, "Ours", lambda: None)
    for name in ("starts", "scaling", "reading"):
        monkeypatch.setattr(count_nouns, name, lambda *_: "")
    monkeypatch.setattr(count_nouns, "run", lambda *_: peak_of(peak_bytes))
    assert count_nouns.main(["--zipf-captions", str(size)]) == code
    assert f"{size:,} captions of 5 distinct words" in capsys.readouterr().out


def test_what_is_read_from_parquet_is_named(synthetic_nltk_data, tmp_path, monkeypatch, capsys):
    import json

    corpus = {DENSE: pa.array(["A dog.", "Two cats sat."]), ALT_TEXT: pa.array(["Poster", "PHOTO 1"])}
    monkeypatch.setattr(counting, "load", lambda: corpus)
    counting.show_reading(tmp_path, 200)
    found = json.loads(capsys.readouterr().out)
    written = pq.read_table(tmp_path / "captions.parquet")["caption"].to_pylist()
    assert found["num_distinct"] == len(set(written)) == 4
    assert found["share_alt_text"] == sum(text in corpus[ALT_TEXT].to_pylist() for text in written) / 200
    for way in ("read", "counted"):
        assert found[way].pop("num_captions") == 200
        found[way] = {"num_captions": 200, "cpu_s": 0.5}
    line = count_nouns.reading_line(found)
    assert "200 captions from Parquet" in line
    assert "90% dense and 10% alt-texts, drawn with repetition: 4 different ones" in line
    assert "a warm one: reading alone 400 captions per CPU-second" in line


def test_the_stream_is_counted_and_merged(synthetic_nltk_data, tmp_path, monkeypatch, capsys):
    import json

    monkeypatch.setattr(counting, "_UNIT", 700)
    monkeypatch.setattr(counting, "_BLOCK", 300)
    monkeypatch.setattr(counting, "_ZIPF_WORDS", 5000)
    counting.show_zipf(tmp_path, 2000)
    said = json.loads(capsys.readouterr().out)
    assert len(list(tmp_path.iterdir())) == 3
    stream = Zipf(5000)
    sizes = [300, 300, 100, 300, 300, 100, 300, 300]
    texts = [text for size in sizes for text in stream.captions(size).to_pylist()]
    assert said["num_rows"] == len(counting.count_by_nltk(texts))
    assert said["num_words"] >= said["num_rows"]
    assert said["peak_bytes"] > 10 << 20
