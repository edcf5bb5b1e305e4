"""Which rows are drawn: always the same ones, about as many as asked for, nested, and not by their order."""

import numpy as np
import pytest

from pixart_data.shares import MAX_LEVEL, level_of, levels


@pytest.mark.parametrize(
    ("num_rows", "most_rows", "level"),
    [(0, 10, 0), (1, 10, 0), (10, 10, 0), (11, 10, 1), (20, 10, 1), (21, 10, 2), (40, 10, 2), (41, 10, 3), (7, 1, 3)],
)
def test_the_level_is_the_least_at_which_no_more_rows_are_taken(num_rows, most_rows, level):
    assert level_of(num_rows, most_rows) == level
    assert num_rows / 2**level <= most_rows


def test_there_is_a_highest_level():
    assert level_of(10**30, 1) == MAX_LEVEL


def test_a_row_has_the_same_level_however_its_file_is_cut():
    whole = levels("captions", 0, 10_000)
    for size in (1, 7, 999):
        cut = [levels("captions", start, min(size, 10_000 - start)) for start in range(0, 10_000, size)]
        np.testing.assert_array_equal(np.concatenate(cut), whole)


def test_one_row_in_two_to_the_level_is_drawn_and_rows_of_neighbouring_files_are_drawn_apart():
    drawn = levels("captions", 0, 1 << 18)
    for level in range(12):
        expected = (1 << 18) / 2**level
        assert abs((drawn >= level).sum() - expected) < 5 * np.sqrt(expected) + 1
    first = np.array([levels(f"part-{number:05d}", 0, 1)[0] for number in range(4096)])
    assert abs((first >= 1).sum() - 2048) < 5 * np.sqrt(2048)
    both = (drawn[:4096] >= 1) & (levels("captions-2", 0, 4096) >= 1)
    assert abs(both.sum() - 1024) < 5 * np.sqrt(1024)


def test_rows_beyond_any_number_have_a_level():
    drawn = levels("", (1 << 64) - 2, 4)
    assert drawn.shape == (4,)
    assert ((drawn >= 0) & (drawn <= MAX_LEVEL)).all()
    assert levels("captions", 0, 0).shape == (0,)
