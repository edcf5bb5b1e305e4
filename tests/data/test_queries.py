import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data.errors import ConfigError
from pixart_data.queries import parse

TABLE = pa.table(
    {
        "height": pa.array([512, 100, None, 600], pa.int32()),
        "width": pa.array([600, 600, 600, 600], pa.int32()),
        "bucket": pa.array(["1.00", "0.75", "1.00", "2.00"]),
        "score": pa.array([6, 7, None, 5.0], pa.float32()),
        "cut": [True, False, None, True],
        "fetched": pa.array([1, 2, 3, 4], pa.timestamp("s")),
    }
)


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ('min(height, width) >= 512 and bucket in ("1.00", "0.75") and score > 5.5', [0]),
        ("not score > 5.5", [3]),
        ('score > 5.5 or bucket == "1.00"', [0, 1, 2]),
        ("not cut", [1]),
        ("cut == True", [0, 3]),
        ("cut and height + width > 1_150", [3]),
        ('bucket not in ["1.00"]', [1, 3]),
        ("score not in (6, 5.0)", [1]),
        ("100 <= height < 600", [0, 1]),
        ("height / width > 0.5", [0, 3]),
        ("-1 * height < -200", [0, 3]),
        ("abs(score - 6.5) <= 0.5", [0, 1]),
        ("max(height, 550, width - 10) == 590", [0, 1]),
        ('bucket < "0.80"', [1]),
        ("score > 1\nand cut", [0, 3]),
    ],
)
def test_rows_match_where_the_condition_is_true(query, rows):
    found = parse(query)
    assert np.flatnonzero(found.mask(TABLE)).tolist() == rows
    assert np.flatnonzero(pickle.loads(pickle.dumps(found)).mask(TABLE)).tolist() == rows
    chunks = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 0), TABLE.slice(1)])
    assert np.flatnonzero(found.mask(chunks)).tolist() == rows


def test_a_query_names_its_columns():
    assert parse('min(height, width) > 5 and bucket in ("score",)').columns == {"height", "width", "bucket"}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ('bukket == "1"', "no column bukket; did you mean bucket?"),
        ("aesthetic > 5", "no column aesthetic; name another; there are bucket, cut, fetched, height, score, width"),
        ("bucket == 1.0", "found a text and a number; texts stand in quotes"),
        ('bucket = "1.00"', "write == to compare"),
        ('bucket in "1.00"', r"expected a list after in, and there only, e.g. \(\"1.00\", \"0.75\"\)"),
        ("bucket in ()", "expected a list after in"),
        ("bucket in (score, 1)", "expected numbers and texts alone"),
        ("score", "expected a condition, found a number; compare it, e.g. `score > 0`"),
        ("score + 1 and cut", "score \\+ 1 in .*: expected a truth value, found a number"),
        ("1 < 2", "expected the name of a column, found none"),
        ("height & 4 > 3", "write and, or"),
        ("height ** 4 > 3", "height \\*\\* 4 is not understood"),
        ("score is cut", "compare with =="),
        ("score == None", "None: expected a number or a text"),
        ("min(score) > 1", "min: expected at least two values"),
        ("abs(score, 1) > 1", "abs: expected one value"),
        ("len(bucket) > 1", r"len\(\) is not known; there are min, max and abs"),
        ("fetched > 1", r"column fetched: expected numbers, texts, true and false, found timestamp\[s\]"),
        ("height * 9223372036854775807 > 0", "cannot be computed: overflow"),
        ("height > 99999999999999999999", "expected a number of 64 bits"),
        ("", "expected a condition, found invalid syntax"),
        ("score >", "expected a condition, found invalid syntax"),
        ("-" * 9000 + "score > 1", "expected fewer parts in each other"),
        ("+".join(["score"] * 2000) + " > 1", "expected fewer parts in each other"),
        ("score > 1" + " " * 20_000, "expected at most 20,000 characters"),
    ],
)
def test_a_query_that_cannot_be_meant_is_refused_with_what_to_write(query, message):
    with pytest.raises(ConfigError, match=message):
        parse(query).mask(TABLE)


@pytest.mark.parametrize(
    "query",
    [
        '__import__("os").system("true") == 0', "(lambda: score)() > 1", "score.real > 1", "score[0] > 1",
        "[x for x in score] == 1", 'f"{score}" == "1"', "(y := score) > 1", "score > 1 if cut else cut", "~cut",
        "min(score, *height) > 1", "min(score, 2, key=score) > 1", "score > 1j", 'bucket == b"1.00"', "{score} > 1",
    ],
)  # fmt: skip
def test_nothing_but_the_language_is_understood(query):
    with pytest.raises(ConfigError, match="not understood|not known|expected"):
        parse(query)


@given(st.lists(st.tuples(st.none() | st.integers(-5, 5), st.floats(-5, 5)), min_size=1, max_size=20))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_query_says_what_python_would_of_each_row(rows):
    query = "not (a + 2 * b > 1 or a == 3) and -a / 4 <= max(b, 0.25) and a in (-5, -4, -1, 0, 2, 3)"
    table = pa.table({"a": pa.array([a for a, _ in rows], pa.int32()), "b": pa.array([b for _, b in rows])})
    expected = [a is not None and eval(query, {"a": a, "b": b, "max": max}) for a, b in rows]  # noqa: S307
    assert parse(query).mask(table).tolist() == expected
