"""What compiled code counts in captions, against the definitions written down once more in plain Python."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data import phrases
from pixart_data.measures import COUNTS, Counter
from pixart_data.tagging.blocks import TAGS, Block
from pixart_data.tagging.references import TextBlobEngine
from pixart_data.tagging.vocabulary import Vocabulary, hash_of
from tests.tokens import block_of, parse, tokens_of

CAPTIONS = Path(__file__).parents[2].parent / "shared" / "captions"

NOUNS = {"NN", "NNS", "NNP", "NNPS"}
ADJECTIVES = {"JJ", "JJR", "JJS"}
PARTICIPLES = {"VBG", "VBN"}
OPENINGS = {"DT", "PDT", "POS", "PRP$", "WP$", "CD"}
JOINING = {"RB", "RBR", "RBS", "CC", ","}
CLOSERS = set("\"'”’»)]}`")
MARKS = set(".!?…。！？।؟")

SENTENCES = [
    "The image features a large, red ball on top of a wooden table. It is to the left of two smiling women.",
    "In addition to the dogs, there appears to be a parked car, possibly a taxi, in the background.",
    "Two dogs and two dogs and two dogs and two dogs run.",
    "I'm sorry, but I can't see the image. As an AI, I cannot describe it.",
    "I’m sorry, I don’t see an image.",
    "“The cat’s on the ‘mat’,” said Anna — then she left.",
    'She says: "Look at the very brightly painted door!"',
    "(An old man, seen from behind.)",
    "A man standing next to a",
    "PHOTO | Vintage Poster / 24x36 in. <Framed> #art @home",
    "Una mujer con un perro grande en la playa. 一只猫坐在桌子上。",
    "dog",
    ". . . ! ?",
    '"',
    "",
    " \n ",
    "\0",
    "the train is parked on a platform . " * 40,
    "very " * 500,
]


def expected(tokens):
    """Return the counts of one caption by their definitions."""
    words, tags = [word.lower() for word, _, _ in tokens], [tag for _, tag, _ in tokens]
    nouns = [word for word, tag in zip(words, tags, strict=True) if tag in NOUNS]
    starts = [i for i, (_, _, begins) in enumerate(tokens) if begins]
    openers = [kind_of(words, i, {"boilerplate": phrases.BOILERPLATE, "refusal": phrases.REFUSALS})[0] for i in starts]
    kinds = kinds_of(words, {"spatial": phrases.SPATIAL, "hedge": phrases.HEDGES})
    num_phrases, num_attributed, num_participles = noun_phrases(tags)
    return {
        "num_tokens": len(tokens),
        "num_sentences": len(starts),
        "num_nouns": len(nouns),
        "num_distinct_nouns": len(set(nouns)),
        "num_generic_nouns": sum(noun in phrases.GENERIC_NOUNS for noun in nouns),
        "num_attributes": sum(tag in ADJECTIVES for tag in tags) + num_participles,
        "num_noun_phrases": num_phrases,
        "num_attributed_phrases": num_attributed,
        "num_spatial": kinds.count("spatial"),
        "num_numbers": tags.count("CD"),
        "num_hedges": kinds.count("hedge"),
        "num_boilerplate": openers.count("boilerplate"),
        "num_refusals": openers.count("refusal"),
        "num_repeated_tokens": num_repeated(words),
        "num_distinct_pairs": len(set(zip(words, words[1:], strict=False))),
        "final_mark": ends_in_mark([word for word, _, _ in tokens]),
        "last_tag": TAGS.index(tags[-1]) if tags and tags[-1] in TAGS else len(TAGS) if tags else 0,
    }


_SPELLINGS = {}


def kind_of(words, start, lists):
    """Return kind and length of the longest phrase at a position, compared word by word."""
    best = (None, 1)
    for kind, members in lists.items():
        if members not in _SPELLINGS:
            spellings = {tokens for phrase in members for tokens in phrases.spellings(phrase)}
            _SPELLINGS[members] = {tokens[0] for tokens in spellings}, spellings
        firsts, spellings = _SPELLINGS[members]
        for length in range(1, 9) if words[start] in firsts else ():
            if tuple(words[start : start + length]) in spellings and (best[0] is None or length > best[1]):
                best = (kind, length)
    return best


def kinds_of(words, lists):
    found, i = [], 0
    while i < len(words):
        kind, length = kind_of(words, i, lists)
        found += [kind] if kind else []
        i += length
    return found


def noun_phrases(tags):
    """Look back from each run of nouns: phrases, those with an attribute, and participles that are attributes."""
    num_phrases = num_attributed = num_participles = 0
    for i, tag in enumerate(tags):
        if tag not in NOUNS or (i and tags[i - 1] in NOUNS):
            continue
        num_phrases += 1
        first = i
        while first and tags[first - 1] in ADJECTIVES | PARTICIPLES | JOINING:
            first -= 1
        run = tags[first:i]
        if not (first and tags[first - 1] in OPENINGS):  # then its first adjective opens the phrase
            adjectives = [at for at, member in enumerate(run) if member in ADJECTIVES]
            run = run[adjectives[0] :] if adjectives else []
        if run and run[-1] in ADJECTIVES | PARTICIPLES:
            num_attributed += 1
            num_participles += sum(member in PARTICIPLES for member in run)
    return num_phrases, num_attributed, num_participles


def num_repeated(words):
    covered, seen = set(), set()
    for i in range(len(words) - 3):
        run = tuple(words[i : i + 4])
        if run in seen:
            covered.update(range(i, i + 4))
        seen.add(run)
    return len(covered)


def ends_in_mark(words):
    while len(words) > 1 and set(words[-1]) <= CLOSERS:
        words = words[:-1]
    last = words[-1].rstrip("".join(CLOSERS - {"`"})) if words else ""
    return int(last[-1:] in MARKS and last != "")


def assert_as_expected(block, vocabulary):
    found = Counter(vocabulary).count(block)
    assert found.shape == (len(block), len(COUNTS))
    for row, tokens in zip(found.tolist(), tokens_of(block, vocabulary), strict=True):
        assert dict(zip(COUNTS, row, strict=True)) == expected(tokens or []), tokens


def salad(seed, num_captions):
    """Captions of the words that matter and others, with any tags, among them ones that no tagger would give."""
    draw = random.Random(seed)
    special = phrases.lexicon(phrases.SPATIAL, phrases.HEDGES, phrases.REFUSALS)
    common = ["dog", "Dog", "DOG", ".", "!", "''", ")", "the", "über", "ÜBER", "x...", 'b."', "I", "n't", "’", "…"]
    tags = [*TAGS, "?", *10 * ["NN", "JJ", "VBN", "DT", ",", "RB"]]
    captions = []
    for _ in range(num_captions):
        words = draw.choices(draw.choice([special, common, special + common, ["to", "the", "left", "of"]]), k=20)
        if draw.random() < 0.3:
            lists = (phrases.SPATIAL, phrases.HEDGES, phrases.BOILERPLATE, phrases.REFUSALS)
            words += [word for phrase in draw.choices(draw.choice(lists), k=6) for word in phrase.split()]
        if draw.random() < 0.3:
            words = words[:5] * draw.randrange(1, 40)
        words = words[: draw.randrange(len(words) + 1)]
        tokens = [(word, draw.choice(tags), i == 0 or draw.random() < 0.15) for i, word in enumerate(words)]
        captions.append(None if draw.random() < 0.05 else tokens)
    return captions


def test_sentences_are_counted_as_defined():
    engine = TextBlobEngine()
    assert_as_expected(engine.tag(pa.array([*SENTENCES, None])), engine.vocabulary)


@pytest.mark.parametrize("seed", range(3))
def test_any_words_with_any_tags_are_counted_as_defined(seed):
    assert_as_expected(*block_of(salad(seed, 400)))


def test_an_adjective_and_a_participle_in_its_place_are_attributes():
    examples = {
        "a/DT smiling/VBG woman/NN": (1, 1, 1),
        "wearing/VBG glasses/NNS": (0, 1, 0),
        "the/DT ball/NN is/VBZ red/JJ": (1, 1, 0),
        "a/DT large/JJ ,/, carved/VBN and/CC painted/VBN door/NN": (3, 1, 1),
        "wearing/VBG red/JJ shirts/NNS": (1, 1, 1),
        "the/DT very/RB brightly/RB colored/VBN kite/NN": (1, 1, 1),
        "a/DT parked/VBN ,/, the/DT car/NN": (0, 1, 0),
        "dog/NN house/NN ./. dog/NN": (0, 2, 0),
    }
    block, vocabulary = block_of([parse(text) for text in examples])
    found = Counter(vocabulary).count(block)
    columns = [COUNTS.index(name) for name in ("num_attributes", "num_noun_phrases", "num_attributed_phrases")]
    assert [tuple(row) for row in found[:, columns].tolist()] == list(examples.values())


@pytest.mark.parametrize("name", ["llava_coco", "vlm_other", "laion_alt_text"])
def test_real_captions_are_counted_as_defined(name):
    if not CAPTIONS.is_dir():
        pytest.skip("no captions beside the repository")
    engine = TextBlobEngine()
    captions = pq.read_table(CAPTIONS / f"{name}.parquet")["caption"]
    assert_as_expected(engine.tag(captions), engine.vocabulary)


def test_words_that_come_later_are_known_as_well():
    vocabulary = Vocabulary()
    counter = Counter(vocabulary)
    first, _ = block_of([parse("A/DT cat/NN")], vocabulary)
    assert counter.count(first)[0, COUNTS.index("num_spatial")] == 0
    rows = [[(f"word{i}", "NN", i == 0) for i in range(20_000)], parse("It/PRP is/VBZ on/IN top/NN of/IN it/PRP ./.")]
    later, _ = block_of(rows, vocabulary)
    found = counter.count(later)
    assert found[0, COUNTS.index("num_distinct_nouns")] == 20_000
    assert found[1, COUNTS.index("num_spatial")] == 1
    assert found[1, COUNTS.index("final_mark")] == 1


def test_ten_thousand_tokens_of_a_loop():
    tokens = [(word, "NN", i == 0) for i, word in enumerate(["a", "b", "c", "d", "e"] * 2000)]
    block, vocabulary = block_of([tokens])
    row = dict(zip(COUNTS, Counter(vocabulary).count(block)[0].tolist(), strict=True))
    assert row["num_repeated_tokens"] == 9995
    assert row["num_distinct_pairs"] == 5
    assert row["num_distinct_nouns"] == 5


def test_no_captions_at_all():
    block, vocabulary = block_of([])
    assert Counter(vocabulary).count(block).shape == (0, len(COUNTS))


def test_arrays_that_cannot_be_written_are_read():
    block, vocabulary = block_of([parse("A/DT cat/NN ./.")])
    for array in (block.words, block.tags, block.offsets, block.begins, block.counted):
        array.flags.writeable = False
    assert Counter(vocabulary).count(block)[0, COUNTS.index("num_nouns")] == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_run_shared_with_the_prompt_is_found_wherever_it_is(seed):
    draw = random.Random(seed)
    words = ["a", "b", "c", "d"]
    captions = [[(draw.choice(words), "NN", False) for _ in range(draw.randrange(30))] for _ in range(300)]
    prompts = [draw.choices(words, k=draw.randrange(12)) for _ in captions]
    runs = [draw.randrange(7) for _ in captions]
    block, vocabulary = block_of(captions)
    ends = np.cumsum([0, *map(len, prompts)])
    spans = np.column_stack([ends[:-1], ends[1:], runs]).astype(np.int64)
    hashes = np.array([hash_of(word) for prompt in prompts for word in prompt], np.uint64)
    found = Counter(vocabulary).find_echoes(block, hashes, spans).tolist()
    assert found == [
        bool(run) and run in {n for n in range(1, 8) if shares([word for word, _, _ in caption], prompt, n)}
        for caption, prompt, run in zip(captions, prompts, runs, strict=True)
    ]
    assert 0 < sum(found) < len(found)


def shares(caption, prompt, length):
    runs = {tuple(prompt[i : i + length]) for i in range(len(prompt) - length + 1)}
    return any(tuple(caption[i : i + length]) in runs for i in range(len(caption) - length + 1))


def test_phrases_are_found_by_their_longest_form_and_do_not_overlap():
    text = "on/IN top/NN of/IN on/IN the/DT left/JJ side/NN to/TO the/DT left/NN might/MD be/VB"
    block, vocabulary = block_of([parse(text)])
    row = dict(zip(COUNTS, Counter(vocabulary).count(block)[0].tolist(), strict=True))
    assert (row["num_spatial"], row["num_hedges"]) == (3, 1)


def test_a_typographic_apostrophe_is_one_too():
    assert phrases.spellings("i 'm sorry") == [("i", "'m", "sorry"), ("i", "’", "m", "sorry")]
    assert phrases.spellings("i ca n't") == [("i", "ca", "n't"), ("i", "can", "’", "t")]
    assert phrases.spellings("on top of") == [("on", "top", "of")]


def test_the_lists_are_written_as_the_tokenizer_cuts_them():
    from nltk.tokenize import NLTKWordTokenizer

    for phrase in (*phrases.SPATIAL, *phrases.HEDGES, *phrases.BOILERPLATE, *phrases.REFUSALS, *phrases.GENERIC_NOUNS):
        assert phrase == phrase.lower()
        said = phrase.replace(" n't", "n't").replace(" '", "'").replace(" ,", ",").replace("can not", "cannot")
        for spelling, tokens in zip((said, said.replace("'", "’")), phrases.spellings(phrase), strict=False):
            assert tuple(NLTKWordTokenizer().tokenize(f"{spelling} x")[:-1]) == tokens


def test_blocks_of_an_engine_are_what_is_made_by_hand():
    engine = TextBlobEngine()
    block = engine.tag(pa.array(SENTENCES))
    again, _ = block_of(tokens_of(block, engine.vocabulary), engine.vocabulary)
    assert isinstance(again, Block)
    assert np.array_equal(block.words, again.words)
    assert np.array_equal(block.tags, again.tags)
    assert np.array_equal(block.offsets, again.offsets)
