"""Draws that belong to a row: the right distribution, and nothing of the neighbours in them."""

import pytest
import torch

from pixart_data.drawing import Drawing
from pixart_data.questions import Decoding

PROMPT = torch.zeros(1, 3, dtype=torch.long)
SCORES = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])


def decoding(temperature=1.0, top_p=1.0, penalty=0.0):
    return Decoding(temperature, top_p, 8, penalty)


def draw(how, seeds, scores=SCORES, steps=1):
    """Return the tokens (B, steps) that greedy decoding takes with the same scores at each step."""
    drawing = Drawing(how, seeds)
    ids = PROMPT.expand(len(seeds), -1)
    for _ in range(steps):
        ids = torch.cat([ids, drawing(ids, scores.expand(len(seeds), -1)).argmax(1, keepdim=True)], 1)
    return ids[:, PROMPT.shape[1] :]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_shares_of_the_scores(temperature):
    count = 20_000
    found = torch.bincount(draw(decoding(temperature), range(count))[:, 0], minlength=5) / count
    expected = torch.softmax(SCORES / temperature, 0)
    assert torch.all((found - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt() + 1e-4)


def test_a_row_draws_the_same_in_any_company():
    seeds = [5, 6, 7, 8]
    together = draw(decoding(), seeds, steps=20)
    alone = torch.cat([draw(decoding(), [seed], steps=20) for seed in seeds])
    assert torch.equal(together, alone)
    assert len({tuple(row) for row in together.tolist()}) == 4
    assert torch.equal(draw(decoding(), seeds[::-1], steps=20), together.flip(0))


def test_what_is_beyond_top_p_is_never_drawn():
    drawn = draw(decoding(temperature=3.0, top_p=0.6), range(2000))
    assert set(drawn.flatten().tolist()) == {0, 1}  # 0.40 and 0.28 of the probability at that temperature


def test_each_repetition_costs_the_penalty_and_the_prompt_does_not_count():
    greedy = decoding(temperature=0.0, penalty=0.4)
    # 2.0, 1.6, 1.2 for the first token; at 0.8 the second one is ahead, and then 0.8 is more than 0.6
    assert draw(greedy, [0], steps=6)[0].tolist() == [0, 0, 0, 1, 0, 1]
    assert draw(decoding(temperature=0.0), [0], steps=4)[0].tolist() == [0, 0, 0, 0]


def test_half_precision_scores_are_drawn_in_full():
    assert Drawing(decoding(), [1])(PROMPT, SCORES[None].bfloat16()).dtype == torch.float32
