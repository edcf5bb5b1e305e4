import pytest

from pixart_data.texts import POLICIES, clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\tred \n\n house\r\n", "a red house"),
        ("no\u00a0break\u2003space\u3000here", "no break space here"),
        ("A Red HOUSE, 12 (twelve) [windows]!", "A Red HOUSE, 12 (twelve) [windows]!"),
        ("红色的房子 дом <b>bold</b> http://x.y", "红色的房子 дом <b>bold</b> http://x.y"),
        (" \n\t ", ""),
        ("", ""),
    ],
)
def test_whitespace_1_takes_surplus_white_space_and_nothing_else(text, expected):
    assert clean(text, "whitespace-1") == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_cleaning_twice_is_cleaning_once(policy):
    for text in ("  A  red\nhouse ", "\u00a0", "Ünïcode  \u2028 text"):
        once = clean(text, policy)
        assert clean(once, policy) == once


def test_every_policy_of_the_job_file_exists():
    from typing import get_args

    from pixart_data.sections import TextFeatures

    assert set(get_args(TextFeatures.model_fields["cleaning"].annotation)) == set(POLICIES)
