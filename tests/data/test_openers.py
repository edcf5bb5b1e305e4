"""How sentences begin: exact, and with a stated bound where memory ends."""

import json
import random
from collections import Counter

import pytest

from pixart_data import openers
from pixart_data.openers import OpenerCounter, Openers
from pixart_data.tagging.vocabulary import Vocabulary
from tests.tokens import block_of, parse


def sentences(seed, num_captions, words):
    draw = random.Random(seed)
    captions = []
    for _ in range(num_captions):
        lengths = [draw.randrange(1, 6) for _ in range(draw.randrange(4))]
        captions.append([(draw.choice(words), "NN", i == 0) for length in lengths for i in range(length)])
    return captions


def counted(captions):
    """Count the first three words of each sentence, or the whole of a shorter one."""
    found = Counter()
    for caption in captions:
        starts = [i for i, (_, _, begins) in enumerate(caption) if begins]
        for start, stop in zip(starts, [*starts, len(caption)][1:], strict=True):
            found[" ".join(word.lower() for word, _, _ in caption[start:stop][:3])] += 1
    return dict(found)


def test_openers_are_counted_over_blocks_whatever_their_case():
    captions = sentences(0, 500, ["the", "The", "THE", "image", "Über", "über", "."])
    counter = OpenerCounter(vocabulary := Vocabulary())
    for start in range(0, len(captions), 100):
        counter.add(block_of(captions[start : start + 100], vocabulary)[0])
    found = counter.take()
    assert found.counts == counted(captions)
    assert found.missed_at_most == 0
    assert counter.take().counts == {}


def test_captions_without_a_token_have_no_opener():
    block, vocabulary = block_of([None, [], parse("The/DT cat/NN"), None, parse("A/DT | The/DT cat/NN"), []])
    counter = OpenerCounter(vocabulary)
    counter.add(block)
    assert counter.take().counts == {"the cat": 2, "a": 1}


def test_the_order_of_equals_is_that_of_their_letters():
    assert Openers([("b", 2), ("a", 2), ("c", 3)]).top(2) == [("c", 3), ("a", 2)]


@pytest.mark.parametrize("seed", range(3))
def test_where_memory_ends_the_bound_holds(seed, monkeypatch):
    monkeypatch.setattr(openers, "_MAX_ROWS", 40)
    monkeypatch.setattr(openers, "KEPT", 12)
    monkeypatch.setattr(openers, "_MAX_MERGED", 20)
    draw = random.Random(seed)
    words = [f"w{int(draw.paretovariate(0.6)) % 30}" for _ in range(60)]
    total, whole = Openers(), []
    for part in range(4):
        captions = sentences(10 * seed + part, 300, words)
        whole += captions
        counter = OpenerCounter(vocabulary := Vocabulary())
        for start in range(0, len(captions), 50):
            counter.add(block_of(captions[start : start + 50], vocabulary)[0])
        total.merge(Openers.from_json(json.loads(json.dumps(counter.take().to_json()))))
    exact, shown = counted(whole), total.to_json()
    assert 0 < len(shown["counts"]) <= 12
    assert shown["missed_at_most"] > 0
    for opener, count in shown["counts"]:
        assert exact[opener] - shown["missed_at_most"] <= count <= exact[opener]
    left_out = set(exact) - {opener for opener, _ in shown["counts"]}
    assert max(exact[opener] for opener in left_out) <= shown["missed_at_most"]


def test_a_cut_is_held_against_the_largest_count_that_it_drops(monkeypatch):
    """In a worker, before anything is taken: what is dropped may come back and be counted from nothing."""
    monkeypatch.setattr(openers, "_MAX_ROWS", 4)
    counter = OpenerCounter(vocabulary := Vocabulary())

    def add(**counts):
        words = [word for word, count in counts.items() for _ in range(count)]
        counter.add(block_of([[(word, "NN", True)] for word in words], vocabulary)[0])

    add(a=9, b=8, c=3, d=2, e=1, f=1, g=1, h=1)
    assert counter._missed == 0  # 8 openers are not too many yet
    add(i=1)
    assert counter._missed == 3  # a and b are kept, of the others c has most
    add(c=4, j=1, k=1)
    add(l=1, m=1, n=1, o=1)
    found = counter.take()
    assert found.counts == {"a": 9, "b": 8}
    assert found.missed_at_most == 3 + 4  # c: 7 of 7


def test_merging_adds_up_and_json_holds_it():
    total = Openers([("the image", 3), ("a", 1)])
    total.merge(Openers([("the image", 2), ("b", 1)], 4))
    assert total.counts == {"the image": 5, "a": 1, "b": 1}
    assert total.missed_at_most == 4
    again = Openers.from_json(json.loads(json.dumps(total.to_json())))
    assert (again.counts, again.missed_at_most) == (total.counts, 4)
