"""What a report says of each set: derived from counts, and through stats.json and back."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from pixart_data import corpora
from pixart_data.corpora import PAPER_ROWS, Extras, build, from_json, gained, notes, ranks, to_json
from pixart_data.errors import ConfigError, DataError
from pixart_data.nouns import VIEWS, Distinct, summarise
from pixart_data.rarefaction import growth, rarefied
from tests.blocks import counted


def captions(num_captions, **times):
    """So many captions, in which each noun occurs so often, one to a caption, the first ones first."""
    rows = [[] for _ in range(num_captions)]
    for noun, count in times.items():
        for k in range(count):
            rows[k % num_captions].append((noun, "NN"))
    return rows


DENSE = counted([*captions(300, image=300, dog=40, umbrella=25, cup=11, Cup=3, rare=2), None])
RAW = counted(captions(120, dog=15, photo=30, stock=12, umbrella=10, cup=1))
EXTRAS = Extras(
    quality={"num_captions": 300},
    lengths={"tokenizer": "t5", "counts": [0, 3]},
    frames={"buckets": {"1.00": 3}},
    rejections={"no_caption": 2},
    language={"share_other": 0.1, "flagged": False},
    gate={"loop": 4},
)


@pytest.fixture
def both():
    return build({"dense": DENSE, "raw": RAW}, {"dense": EXTRAS}, {"dense": "raw"})


def test_the_paper_s_rows_are_table_1_with_the_size_derived():
    rows = [(s.valid_nouns, s.distinct_nouns, s.vn_dn, s.total_nouns, s.nouns_per_image) for s in PAPER_ROWS.values()]
    assert list(PAPER_ROWS) == ["LAION", "LAION-LLaVA", "SAM-LLaVA", "Internal"]
    assert rows == [
        (210_000, 2_461_000, 0.085, 72_000_000, 6.4),
        (85_000, 646_000, 0.133, 233_900_000, 20.9),
        (23_000, 124_000, 0.186, 327_900_000, 29.3),
        (152_000, 582_000, 0.261, 136_600_000, 12.2),
    ]
    assert [s.num_captions for s in PAPER_ROWS.values()] == [11_250_000, 11_190_000, 11_190_000, 11_200_000]
    for stats in PAPER_ROWS.values():
        assert stats.vn_dn == pytest.approx(stats.valid_nouns / stats.distinct_nouns, abs=0.002)


def test_a_corpus_holds_what_its_counts_give(both):
    dense, raw = both
    assert (dense.name, raw.name) == ("dense", "raw")
    assert dense.stats == summarise(DENSE)
    assert dense.views == {view: summarise(DENSE, view) for view in VIEWS}
    assert dense.thresholds == {0: 5, 1: 5, 2: 4, 5: 4, 10: 4, 20: 3, 50: 1, 100: 1}
    assert dense.growth == growth(DENSE)
    assert dense.per_caption == DENSE.per_caption.tolist()
    assert dense.top == [("image", 300), ("dog", 40), ("umbrella", 25), ("cup", 14), ("rare", 2)]
    assert dense.ranks == [(1, 300), (2, 40), (3, 25), (4, 14), (5, 2)]
    assert [getattr(dense, name) for name in vars(EXTRAS)] == list(vars(EXTRAS).values())
    assert (raw.quality, raw.lengths, raw.frames, raw.rejections, raw.language, raw.gate) == (
        None,
        None,
        None,
        {},
        {},
        {},
    )


def test_another_threshold_is_taken_everywhere():
    [corpus] = build({"dense": DENSE}, threshold=30)
    assert {stats.threshold for stats in [corpus.stats, *corpus.views.values()]} == {30}
    assert (corpus.stats.valid_nouns, corpus.growth[-1].valid_nouns, corpus.thresholds[30]) == (2, 2, 2)
    assert any("The paper's threshold is 10" in note for note in notes([corpus]))
    assert "more than 30 times" in to_json([corpus])["definition"]


def test_gained_nouns_are_valid_here_and_not_there(both):
    dense, raw = both
    assert dense.gained == [("image", 300, 0), ("umbrella", 25, 10), ("cup", 14, 1)]
    assert (dense.gained_over, dense.num_gained, dense.num_lost) == ("raw", 3, 2)
    assert (raw.gained, raw.gained_over, raw.num_gained, raw.num_lost) == ([], None, 0, 0)
    assert gained(Distinct.of(RAW), Distinct.of(DENSE)) == [("photo", 30, 0), ("stock", 12, 0)]
    assert gained(Distinct.of(counted([])), Distinct.of(DENSE)) == []
    assert gained(Distinct.of(RAW), Distinct.of(counted([]))) == [("photo", 30, 0), ("dog", 15, 0), ("stock", 12, 0)]


def test_long_lists_are_cut_and_their_length_kept(monkeypatch):
    monkeypatch.setattr(corpora, "GAINED_NOUNS", 2)
    monkeypatch.setattr(corpora, "TOP_NOUNS", 3)
    [dense, _] = build({"dense": DENSE, "raw": RAW}, compare={"dense": "raw"})
    assert (len(dense.gained), dense.num_gained, len(dense.top)) == (2, 3, 3)


def test_sets_are_compared_at_the_size_of_the_smaller_ones_and_at_the_paper_s(monkeypatch):
    small = counted(captions(20, dog=20))
    sets = {"dense": DENSE, "small": small, "raw": RAW, "none": counted([None])}
    sizes = [[point.num_captions for point in corpus.rarefied] for corpus in build(sets)]
    assert sizes == [[20, 120], [20], [20], []]
    monkeypatch.setattr(corpora, "PAPER_CAPTIONS", 50)
    found = build(sets)
    assert [[point.num_captions for point in corpus.rarefied] for corpus in found] == [
        [20, 50, 120],
        [20],
        [20, 50],
        [],
    ]
    assert found[0].rarefied == [rarefied(DENSE, size) for size in (20, 50, 120)]
    assert found[1].rarefied[0].distinct_nouns == found[1].stats.distinct_nouns


def test_ranks_are_few_and_hold_both_ends():
    rng = np.random.default_rng(0)
    number = rng.zipf(1.3, 1000).clip(1, 30)
    counts = counted([[(f"n{k}", "NN")] * int(count) for k, count in enumerate(number)])
    found = ranks(Distinct.of(counts))
    places = [rank for rank, _ in found]
    assert (places[0], places[-1]) == (1, 1000)
    assert 100 < len(found) <= 200
    assert places == sorted(set(places))
    falling = sorted(number.tolist(), reverse=True)
    assert [count for _, count in found] == [falling[rank - 1] for rank in places]
    assert ranks(Distinct.of(counted([]))) == []


def test_exact_and_approximate_sets_are_not_put_into_one_report():
    rough = counted(captions(20, dog=20), "textblob 0.20.1 lexicon (approximate)", approximate=True)
    with pytest.raises(DataError, match="expected all from one tagger, found by hand 1.0 and textblob"):
        build({"exact": DENSE, "rough": rough})
    [corpus] = build({"rough": rough})
    report = to_json([corpus])
    assert report["definition"].startswith("Approximate")
    assert report["sets"][0]["stats"]["definition"].startswith("Approximate")
    assert any(note.startswith("~ approximate: counted with textblob 0.20.1") for note in report["notes"])


@pytest.mark.parametrize("compare", [{"dense": "rew"}, {"dance": "raw"}])
def test_a_set_to_compare_that_is_not_there_is_named(compare):
    with pytest.raises(ConfigError, match="compare: expected names of dense, raw, found '(rew|dance)'"):
        build({"dense": DENSE, "raw": RAW}, compare=compare)


def test_notes_say_what_may_be_compared(both):
    text = "\n".join(notes(both))
    assert "VN/DN grows with sample size" in text
    assert "(here 120 to 11,200,000)" in text
    assert "dense: 1 null or blank caption is not counted." in text
    assert "~" not in text
    damaged = replace(both[0], rejections={"bad_row": 1, "no_caption": 5})
    assert "dense: 1 damaged row is not counted." in notes([damaged])
    rough = [replace(corpus, stats=replace(corpus.stats, approximate=True)) for corpus in both]
    assert "(here 120 to 300)" in "\n".join(notes(rough))  # the paper's rows are not among what compares
    full = replace(both[0], stats=replace(both[0].stats, num_captions=11_000_000))
    assert not any("grows with sample size" in note for note in notes([full]))


def test_json_round_trip(both):
    report = to_json(both)
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again == report
    assert from_json(again) == both
    assert (report["format"], report["version"]) == ("pixart-stats", 2)
    rows = [row["stats"] for row in (*report["sets"], *report["paper"])]
    rows += [stats for row in report["sets"] for stats in row["views"].values()]
    assert all(row["definition"] and row["tagger"] and row["approximate"] is False for row in rows)
    assert [row["name"] for row in report["paper"]] == list(PAPER_ROWS)
    assert from_json(to_json([])) == []


def test_a_report_of_an_earlier_toolkit_says_what_to_do():
    earlier = {"format": "pixart-stats", "version": 1, "sets": [{"name": "a", "top_nouns": []}]}
    with pytest.raises(
        DataError, match="expected pixart-stats version 2, found .* version 1; run `pixart stats` again"
    ):
        from_json(earlier)


def without(report, *path):
    report = copy.deepcopy(report)
    *way, last = path
    place = report
    for step in way:
        place = place[step]
    del place[last]
    return report


def test_damaged_reports_are_refused(both):
    report = to_json(both)
    for damaged, message in [
        ([], "expected pixart-stats version 2"),
        ({}, "found None version None"),
        ({**report, "format": "other"}, "found other version 2"),
        (without(report, "sets"), "expected a list of sets"),
        ({**report, "sets": 3}, "sets is damaged"),
        (without(report, "sets", 0, "name"), "sets.0.name is damaged"),
        (without(report, "sets", 1, "stats", "vn_dn"), "sets.1.stats.vn_dn is damaged"),
        ({**report, "sets": [{**report["sets"][0], "top": [["dog"]]}]}, r"sets.0.top.0.* is damaged"),
        ({**report, "sets": [{**report["sets"][0], "per_caption": ["many"]}]}, "sets.0.per_caption.0 is damaged"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            from_json(damaged)
        assert str(caught.value).startswith("stats.json: ")
        assert "run `pixart stats` again" in str(caught.value)
