"""What fails the gate, and what just does not."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pixart_data.errors import ConfigError
from pixart_data.gates import FAILURES, CaptionGate, failures
from pixart_data.quality import MEASURES
from pixart_data.sections import Gate

CAPTIONS = Path(__file__).parents[2].parent / "shared" / "captions"
PAPER = "Describe this image and its style in a very detailed manner"
GOOD = (
    "The image features a large brown dog that lies on a wooden bench in a small park. To the left of the dog, two "
    "children play with a red ball, and an old man in a black coat reads the morning newspaper."
)
PASSING = {
    "num_tokens": 100,
    "num_sentences": 5,
    "num_nouns": 24,
    "num_distinct_nouns": 17,
    "num_boilerplate": 2,
    "repeated_share": 0.02,
    "distinct_2": 0.9,
    "final_mark": True,
    "truncated": False,
    "refusal": False,
    "echo": None,
}


def judged(gate=None, **measured):
    """Judge a passing row with other values; all of its other measures are null."""
    row = {name: None for name in MEASURES.names} | PASSING | measured
    batch = pa.RecordBatch.from_pylist([row], schema=MEASURES)
    [found] = failures(batch, gate or Gate()).to_pylist()
    return found


def test_a_good_caption_passes():
    assert judged() == []


@pytest.mark.parametrize(
    ("failure", "passes", "fails"),
    [
        ("loop", {"repeated_share": 0.3}, {"repeated_share": 0.31}),
        ("rambling", {"distinct_2": 0.7, "num_tokens": 50}, {"distinct_2": 0.71, "num_tokens": 50}),
        ("rambling", {"distinct_2": 1.0, "num_tokens": 49}, {"distinct_2": 1.0, "num_tokens": 50}),
        ("boilerplate", {"num_boilerplate": 3, "num_sentences": 5}, {"num_boilerplate": 4, "num_sentences": 6}),
        ("boilerplate", {"num_boilerplate": 2, "num_sentences": 2}, {"num_boilerplate": 3, "num_sentences": 3}),
        ("too_short", {"num_tokens": 10}, {"num_tokens": 9}),
        ("too_few_nouns", {"num_distinct_nouns": 3}, {"num_distinct_nouns": 2}),
        ("truncated", {"truncated": False}, {"truncated": True}),
        ("refusal", {"refusal": False}, {"refusal": True}),
        ("echo", {"echo": False}, {"echo": True}),
    ],
)
def test_limits_are_the_last_values_that_pass(failure, passes, fails):
    gate = Gate(
        max_repeated=0.3,
        max_distinct_pairs=0.7,
        rambling_tokens=50,
        max_boilerplate=0.6,
        min_tokens=10,
        min_nouns=3,
    )
    usual = {"distinct_2": 0.5}
    assert judged(gate, **(usual | passes)) == []
    assert judged(gate, **(usual | fails)) == [failure]


def test_no_limit_no_failure():
    off = Gate(
        truncated=False,
        refusal=False,
        echo=False,
        max_repeated=1,
        max_distinct_pairs=1,
        max_boilerplate=1,
        min_tokens=0,
        min_nouns=0,
    )
    worst = {
        "num_tokens": 1,
        "num_distinct_nouns": 0,
        "num_boilerplate": 5,
        "repeated_share": 1.0,
        "distinct_2": 1.0,
        "truncated": True,
        "refusal": True,
        "echo": True,
    }
    assert judged(off, **worst) == []
    assert judged(off, num_tokens=None) == ["empty"]


def test_what_could_not_be_measured_does_not_fail():
    assert judged(repeated_share=None, distinct_2=None, echo=None) == []


def test_a_caption_may_fail_in_several_ways_named_in_one_order():
    batch = pa.RecordBatch.from_pylist(
        [
            PASSING,
            PASSING | {"num_tokens": 3, "num_distinct_nouns": 0, "refusal": True, "truncated": True},
            {},
            PASSING | {"repeated_share": 0.9},
        ],
        schema=MEASURES,
    )
    found = failures(batch, Gate())
    assert found.type == pa.list_(pa.string())
    assert found.to_pylist() == [[], ["refusal", "truncated", "too_short", "too_few_nouns"], ["empty"], ["loop"]]
    assert failures(batch.slice(1, 2), Gate()).to_pylist() == found.to_pylist()[1:3]
    assert failures(batch.slice(0, 0), Gate()).to_pylist() == []


@pytest.fixture(scope="module")
def gate():
    return CaptionGate(Gate(), "textblob")


def test_texts_are_judged(gate):
    cases = [
        (GOOD, PAPER, "stop", []),
        (GOOD, None, None, []),
        (GOOD, PAPER, "length", ["truncated"]),
        (GOOD[:-40], PAPER, "stop", ["truncated"]),
        ("I'm sorry, but I cannot see the image.", PAPER, "stop", ["refusal", "too_short", "too_few_nouns"]),
        (f"{PAPER}. {GOOD}", PAPER, "stop", ["echo"]),
        ("The train is parked on a platform next to a bench. " * 6, PAPER, "stop", ["loop", "too_few_nouns"]),
        ("A dog.", PAPER, "stop", ["too_short", "too_few_nouns"]),
        ("", PAPER, "stop", ["empty"]),
        (" \n", None, None, ["empty"]),
        (None, None, None, ["empty"]),
        (f"{GOOD} \ud83d", PAPER, "stop", ["truncated"]),
        (f"\ud83d\ude00 {GOOD}", PAPER, "stop", []),
    ]
    captions, prompts, reasons, expected = zip(*cases, strict=True)
    assert gate.judge(captions, prompts, reasons) == list(expected)
    assert {name for found in expected for name in found} <= set(FAILURES)


def test_nothing_is_judged_as_nothing(gate):
    assert gate.judge([], [], []) == []


def test_a_gate_keeps_nothing_of_what_it_judged():
    """Not even how sentences begin, which only a report asks for: it would grow with every caption."""
    gate = CaptionGate(Gate(), "textblob")
    gate.judge([GOOD], [PAPER], ["stop"])
    _, inspector = gate._opened
    assert inspector.take_openers().counts == {}
    assert gate.tagger.startswith("textblob ")


@pytest.mark.parametrize("limit", ["max_repeated", "max_distinct_pairs", "max_boilerplate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_limits_are_numbers(limit, value):
    with pytest.raises(ValidationError, match="finite number"):
        Gate(**{limit: value})


def test_threads_share_a_gate(gate):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: gate.judge([GOOD, f"{GOOD} word{i} word"], [None] * 2, [None] * 2), range(40)))
    assert found == [[[], ["truncated"]]] * 40


def test_the_engine_is_opened_by_the_first_caption(monkeypatch, tmp_path):
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    gate = CaptionGate(Gate(), "nltk")
    with pytest.raises(ConfigError, match="download-nltk") as error:
        gate.judge([GOOD], [None], [None])
    assert "or set gate.approximate = true" in str(error.value)
    assert "--approximate" not in str(error.value)


@pytest.mark.parametrize(("name", "least", "most"), [("llava_coco", 0.98, 1.0), ("vlm_other", 0.45, 0.6)])
def test_real_captions_pass_where_nothing_went_wrong(gate, name, least, most):
    if not CAPTIONS.is_dir():
        pytest.skip("no captions beside the repository")
    captions = pq.read_table(CAPTIONS / f"{name}.parquet")["caption"][::4].to_pylist()
    found = gate.judge(captions, [PAPER] * len(captions), ["stop"] * len(captions))
    assert least <= sum(not failed for failed in found) / len(found) <= most
