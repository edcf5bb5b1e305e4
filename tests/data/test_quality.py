"""Rows of measures, and what they come to over a corpus."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest

from pixart_data.gates import failures
from pixart_data.quality import ECHO_WORDS, HISTOGRAMS, MEASURES, PROSE_TOKENS, Inspector, Totals, _prompt_words
from pixart_data.sections import Gate
from pixart_data.tagging.references import NltkEngine, TextBlobEngine
from pixart_data.tagging.vocabulary import Vocabulary, hash_of
from tests.tokens import block_of, parse

PAPER = "Describe this image and its style in a very detailed manner"
GOOD = (
    "The image features a large brown dog that lies on a wooden bench in a small park. To the left of the dog, two "
    "children play with a red ball, and an old man in a black coat reads the morning newspaper."
)


@pytest.fixture(scope="module")
def engine():
    return TextBlobEngine()


@pytest.fixture
def measure(engine):
    """Measure captions: the rows as dicts."""

    def rows(captions, prompts=None, finish_reasons=None):
        texts = pa.array(captions, pa.string())
        return Inspector(engine.vocabulary).measure(engine.tag(texts), prompts, finish_reasons).to_pylist()

    return rows


def test_openers_are_counted_where_they_are_wanted(engine):
    block = engine.tag(pa.array(["The cat sits here. It sleeps."]))
    for wanted, found in ((True, {"the cat sits": 1, "it sleeps .": 1}), (False, {})):
        inspector = Inspector(engine.vocabulary, with_openers=wanted)
        inspector.measure(block)
        assert inspector.take_openers().counts == found


def rounded(row):
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def test_a_row_says_all_of_a_caption():
    text = (
        "The/DT image/NN features/VBZ a/DT red/JJ ball/NN on/IN top/NN of/IN a/DT ball/NN ./. | "
        "It/PRP appears/VBZ to/TO be/VB one/CD of/IN two/CD ./."
    )
    block, vocabulary = block_of([parse(text)])
    batch = Inspector(vocabulary).measure(block)
    assert batch.schema == MEASURES
    assert rounded(batch.to_pylist()[0]) == {
        "num_tokens": 20,
        "num_sentences": 2,
        "num_nouns": 4,
        "num_distinct_nouns": 3,
        "distinct_share": 0.75,
        "num_generic_nouns": 1,
        "num_attributes": 1,
        "attributes_per_noun": 0.25,
        "num_noun_phrases": 4,
        "num_attributed_phrases": 1,
        "num_spatial": 1,
        "num_numbers": 2,
        "num_hedges": 1,
        "num_boilerplate": 2,
        "repeated_share": 0.0,
        "distinct_2": 1.0,
        "final_mark": True,
        "truncated": False,
        "refusal": False,
        "echo": None,
    }


def test_null_and_blank_captions_are_null_and_keep_their_place(measure):
    rows = measure([None, "A dog.", "", " \n\t", "A cat."], pa.array([PAPER] * 5))
    assert [row["num_tokens"] for row in rows] == [None, 3, None, None, 3]
    assert all(value is None for i in (0, 2, 3) for value in rows[i].values())
    assert rows[1]["echo"] is False


def test_shares_of_nothing_are_null(measure):
    [mark, word] = measure(["!", "dog"])
    assert (mark["distinct_share"], mark["attributes_per_noun"], mark["distinct_2"]) == (None, None, None)
    assert (mark["final_mark"], word["final_mark"]) == (True, False)
    assert (mark["repeated_share"], word["distinct_2"]) == (0.0, None)


def test_a_caption_breaks_off(measure):
    long = "the dog and the cat " * 10
    cases = {
        GOOD: False,
        GOOD.rstrip("."): True,
        GOOD.rstrip(".") + ' (seen from "behind.")': False,
        "A dog on a bench": False,
        "A man standing next to a": True,
        "Vintage poster, 24 x 36 in": True,
        "Bookshelf of the": True,
        "Dog and cat, oil on canvas": False,
        long: True,
    }
    assert [row["truncated"] for row in measure(list(cases))] == list(cases.values())


def test_the_length_from_which_a_mark_is_expected(measure):
    words = ["dog"] * PROSE_TOKENS
    assert [row["truncated"] for row in measure([" ".join(words[1:]), " ".join(words)])] == [False, True]


def test_a_caption_that_the_limit_cut_off_is_truncated(measure):
    reasons = pa.array(["length", "stop", None, "length"])
    rows = measure([GOOD, GOOD, GOOD, None], finish_reasons=reasons)
    assert [row["truncated"] for row in rows] == [True, False, False, None]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_finish_reasons_and_prompts_of_any_type(measure, kind):
    reasons, prompts = pa.array(["length", "stop"]).cast(kind), pa.array([PAPER, "Why?"]).cast(kind)
    rows = measure([f"{PAPER}.", GOOD], pa.chunked_array([prompts]), pa.chunked_array([reasons]))
    assert [(row["truncated"], row["echo"]) for row in rows] == [(True, True), (False, False)]


@pytest.mark.parametrize(
    "caption",
    [
        "I'm sorry, but I cannot help with that.",
        "I’m sorry, I can’t see the picture.",
        "As an AI language model, I have no eyes.",
        "A dog. I am unable to say more.",
        "SORRY, no.",
    ],
)
def test_refusals(measure, caption):
    assert measure([caption])[0]["refusal"] is True


@pytest.mark.parametrize("caption", [GOOD, "A man says I'm sorry to his dog.", "A sign reads sorry, we are closed."])
def test_no_refusals(measure, caption):
    assert measure([caption])[0]["refusal"] is False


def test_echoes_of_the_prompt(measure):
    quoting = 'Given the caption of this image "{}", describe this image and its style in a very detailed manner'
    raw = "a golden gate bridge at sunset in california with fog"
    cases = [
        (f"{PAPER}. {GOOD}", PAPER, True),
        (f"{GOOD} {PAPER.upper()}", PAPER, True),
        ("In a very detailed manner, a dog.", PAPER, False),
        ("The style in a very detailed manner is", PAPER, True),
        (GOOD, PAPER, False),
        ("Describe the image. A dog.", "Describe the image.", True),
        ("A dog. Describe it.", "Describe it.", False),
        (f"The image shows {raw}.", quoting.format(raw), False),
        (f"The image shows {raw}.", quoting.format('its "real" name: ' + raw), False),
        (f"Given the caption of this image, {raw}", quoting.format(raw), True),
        (GOOD, None, None),
        (GOOD, "", False),
        (GOOD, "???", False),
    ]
    captions, prompts, expected = zip(*cases, strict=True)
    assert [row["echo"] for row in measure(list(captions), pa.array(prompts))] == list(expected)


def test_the_run_that_makes_an_echo(measure):
    words = PAPER.split()
    captions = [" ".join(["dogs", *words[2 : 2 + length], "dogs"]) for length in (ECHO_WORDS - 1, ECHO_WORDS)]
    assert [row["echo"] for row in measure(captions, pa.array([PAPER] * 2))] == [False, True]


def test_prompts_are_cut_as_captions_are(nltk_data):
    prompts = [PAPER, "What's in the picture? Don't guess.", "Describe it (briefly): its style, colors, mood..."]
    engine = NltkEngine()
    for prompt in prompts:
        words = engine.tag(pa.array([prompt])).words
        hashes = [int(engine.vocabulary.folded()[word]) for word in words]
        marks = [int(hash_of(mark)) for mark in (".", "...", ":")]
        while hashes[-1] in marks:
            hashes.pop()
        assert list(_prompt_words(prompt)) == hashes


def test_captions_in_other_languages_and_scripts(measure):
    rows = measure(
        ["Una mujer con un perro grande en la playa.", "一只猫坐在桌子上。", "Кошка на столе!", "🐶🐱", "\0", "e\u0301"]
    )
    assert [row["final_mark"] for row in rows] == [True, True, True, False, False, False]
    assert [row["refusal"] for row in rows] == [False] * 6
    assert all(row["num_tokens"] for row in rows)


def test_a_loop_is_mostly_repeats_and_a_list_is_not(measure):
    [loop, other] = measure(["The train is parked on a platform. " * 5, GOOD])
    assert loop["repeated_share"] == pytest.approx(0.8)
    assert loop["distinct_share"] == pytest.approx(0.2)
    assert other["repeated_share"] == 0.0


def batches(seed, count):
    """Measures of captions of every kind, some null, with their failures."""
    draw = random.Random(seed)
    vocabulary = Vocabulary()
    inspector = Inspector(vocabulary)
    pool = [
        parse("The/DT image/NN features/VBZ a/DT red/JJ dog/NN ./."),
        parse("Sorry/UH ,/, no/DT | Overall/RB ,/, a/DT"),
    ]
    for _ in range(count):
        captions = [
            draw.choice([None, [token for _ in range(draw.randrange(1, 9)) for token in draw.choice(pool)]])
            for _ in range(draw.randrange(40))
        ]
        prompts = pa.array([draw.choice([None, "the image features a red dog"]) for _ in captions], pa.string())
        measures = inspector.measure(block_of(captions, vocabulary)[0], prompts)
        yield measures, failures(measures, Gate()), inspector.take_openers()


def totals_of(parts):
    totals = Totals()
    for measures, failed, openers in parts:
        totals.add(measures, failed)
        totals.openers.merge(openers)
    return totals


def test_totals_of_parts_are_those_of_the_whole_in_any_order():
    parts = list(batches(0, 12))
    whole = totals_of(parts)
    merged = Totals()
    for start in (8, 0, 4):
        merged.merge(Totals.from_json(json.loads(json.dumps(totals_of(parts[start : start + 4]).to_json()))))
    assert merged.to_json() == whole.to_json()
    assert whole.num_failed > 0
    table = pa.Table.from_batches([measures for measures, _, _ in parts])
    assert totals_of([(batch, None, openers) for batch, (_, _, openers) in zip(table.to_batches(), parts, strict=True)])


def test_totals_are_the_means_shares_and_histograms_of_the_rows():
    parts = list(batches(1, 6))
    totals = totals_of(parts)
    table = pa.Table.from_batches([measures for measures, _, _ in parts])
    facts = totals.to_json()
    assert facts["num_captions"] == len(table) - table["num_tokens"].null_count
    assert facts["num_empty"] == table["num_tokens"].null_count > 0
    for name in MEASURES.names:
        values = [float(value) for value in table[name].to_pylist() if value is not None]
        assert facts["measures"][name]["count"] == len(values)
        assert facts["measures"][name]["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        if name in HISTOGRAMS:
            bins = HISTOGRAMS[name]
            edges = np.append(np.arange(bins.count) * bins.width - 1e-7, np.inf)
            assert facts["measures"][name]["histogram"]["counts"] == np.histogram(values, edges)[0].tolist()
    lists = [failed for _, failures, _ in parts for failed in failures.to_pylist()]
    assert facts["num_failed"] == sum(bool(failed) for failed in lists)
    assert facts["failures"] == {name: sum(name in failed for failed in lists) for name in facts["failures"]}
    assert {"empty", "refusal", "echo", "loop", "truncated"} <= facts["failures"].keys()


def test_a_share_of_one_and_a_huge_count_have_bins():
    assert HISTOGRAMS["distinct_2"].fill(np.array([1.0, 0.995, 0.07], np.float32)).nonzero()[0].tolist() == [7, 99, 100]
    assert HISTOGRAMS["num_tokens"].fill(np.array([0, 9, 10, 499, 10_000]))[[0, 1, 49, 50]].tolist() == [2, 1, 1, 1]


def test_totals_of_nothing():
    totals = Totals.from_json(json.loads(json.dumps(Totals().to_json())))
    assert (totals.num_captions, totals.mean("num_nouns")) == (0, None)
    assert totals.openers.top(5) == []
