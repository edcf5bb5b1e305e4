import pytest
import torch

from pixart_data.errors import ConfigError
from pixart_model.nulls import NullCaption
from pixart_model.packing import pack

LENGTHS = (3, 7, 1, 5)


@pytest.fixture
def text():
    torch.manual_seed(0)
    return pack([torch.randn(n, 4).bfloat16() for n in LENGTHS])


def table(rows):
    return torch.arange(rows * 4, dtype=torch.bfloat16).view(rows, 4) + 100


def unpacked(packed):
    """The captions as the offsets have them, which must be what the lengths have."""
    bounds = packed.offsets.tolist()
    captions = [packed.tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    assert bounds[0] == 0
    assert bounds[-1] == len(packed.tokens)
    assert tuple(len(caption) for caption in captions) == packed.lengths
    return captions


def test_a_dropped_caption_becomes_the_null_caption_at_its_own_length(text):
    replaced = NullCaption(table(2)).replace(text, [False, True, True, False])
    assert replaced.lengths == (3, 2, 2, 5)
    assert replaced.offsets.dtype == torch.int32
    before, after = unpacked(text), unpacked(replaced)
    for i, expected in enumerate((before[0], table(2), table(2), before[3])):
        assert torch.equal(after[i], expected)


def test_the_references_table_is_cut_at_the_length_of_each_caption(text):
    null = NullCaption(table(120), follows_caption=True)
    replaced = null.replace(text, [True, True, False, True])
    assert replaced.lengths == LENGTHS
    before, after = unpacked(text), unpacked(replaced)
    for i, expected in enumerate((table(3), table(7), before[2], table(5))):
        assert torch.equal(after[i], expected)


def test_all_or_none_may_be_dropped(text):
    null = NullCaption(table(2))
    assert torch.equal(null.replace(text, [False] * 4).tokens, text.tokens)
    everything = null.replace(text, [True] * 4)
    assert everything.lengths == (2, 2, 2, 2)
    assert torch.equal(everything.tokens, table(2).repeat(4, 1))


def test_the_captions_decide_the_type(text):
    single = text._replace(tokens=text.tokens.float())
    replaced = NullCaption(table(2)).replace(single, [True, False, False, False])
    assert replaced.tokens.dtype == torch.float32
    assert torch.equal(replaced.tokens[:2], table(2).float())


def test_each_caption_needs_a_word_on_it(text):
    with pytest.raises(ValueError, match="zip"):
        NullCaption(table(2)).replace(text, [True, False])


def test_a_caption_longer_than_the_references_table_is_refused(text):
    null = NullCaption(table(6), follows_caption=True)
    assert len(null.at(6)) == 6
    with pytest.raises(ConfigError, match=r"at most 6 tokens.*found one of 7; use text features with max_tokens = 6"):
        null.replace(text, [False, True, False, False])


def test_it_moves_with_its_convention():
    moved = NullCaption(table(3), follows_caption=True).to("meta")
    assert moved.features.device.type == "meta"
    assert moved.follows_caption
