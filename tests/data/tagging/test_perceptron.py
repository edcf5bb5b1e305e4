"""The compiled tagger against NLTK's own, on the miniature of its data and, where present, on the real one."""

import json
import random
import string
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pixart_data.errors import DataError
from pixart_data.tagging.blocks import TAGS
from pixart_data.tagging.cells import normalise
from pixart_data.tagging.perceptron import Perceptron
from pixart_data.tagging.proof import TIES
from pixart_data.tagging.resources import CLASSES, TAGDICT, WEIGHTS, Resources, find_resources
from pixart_data.tagging.vocabulary import Vocabulary
from tests.grammars import ADJECTIVES, FOREIGN, NAMES, NOUNS, OTHERS, VERBS, split

SHARED = Path(__file__).parents[3].parent / "shared"
SHAPES = [
    *split("1999 19999 199 0 3.14 5th 24x36 10:30 x1 1x - -- -dash dash- --x a-b well-known -a-b ... . , `` '' n't 's"),
    *split("A a I AN an Ab aB ABC Zz -START- -END- -START2- !YEAR !HYPHEN !DIGITS \0 \x7f ~ {"),
    *split("٣٤٥٦ ½ ²³¹⁰ ５０００ ⅣⅣⅣⅣ ４ é É ß ẞ İ ǅ Σς 東京 東 😀 a\u0301 \ufffd ﬁ ſt K é-è -é ٣-٤ ١x"),
    "x" * 300,
    "É" * 300,
]


def arranged(vocabulary, captions):
    ids = {word: vocabulary.intern(word) for word in dict.fromkeys(word for words in captions for word in words)}
    flat = np.array([ids[word] for words in captions for word in words], np.int32)
    return flat, np.cumsum([0, *map(len, captions)])


def compiled_tags(perceptron, vocabulary, captions):
    words, offsets = arranged(vocabulary, captions)
    tags = perceptron.tag(words, offsets)
    return [[TAGS[tag] for tag in tags[i:j]] for i, j in zip(offsets, offsets[1:], strict=False)]


def nltk_tags(captions):
    import nltk

    return [[tag for _, tag in nltk.pos_tag(words)] for words in captions]


def salad(seed, num_tokens):
    """Captions of known words, words like them, unknown words, and odd ones."""
    chance = random.Random(seed)
    known = [*NOUNS, *VERBS, *ADJECTIVES, *NAMES, *OTHERS, *FOREIGN]

    def word():
        kind = chance.random()
        if kind < 0.5:
            return chance.choice(known)
        if kind < 0.7:
            return chance.choice(known).capitalize() + chance.choice(("", "", "s", "ing", "-made"))
        if kind < 0.9:
            return "".join(chance.choices(string.ascii_letters, k=chance.randint(1, 9)))
        return chance.choice(SHAPES)

    captions = []
    while num_tokens > 0:
        captions.append([word() for _ in range(chance.choice((0, 1, 2, 3, 4, 30, 100)))])
        num_tokens -= len(captions[-1])
    return captions


def resources_of(weights, classes=TAGS, fixed=None):
    files = {WEIGHTS: weights, CLASSES: list(classes), TAGDICT: fixed or {}}
    return Resources({name: json.dumps(content).encode() for name, content in files.items()})


def test_equals_nltk_on_a_salad_of_words(synthetic_nltk_data):
    captions = salad(seed=1, num_tokens=25_000)
    vocabulary = Vocabulary()
    perceptron = Perceptron(vocabulary, find_resources())
    assert compiled_tags(perceptron, vocabulary, captions) == nltk_tags(captions)
    assert len(vocabulary) > 4096  # more than are learnt at once, and than the first tables hold


def test_equals_nltk_with_the_data_at_hand(nltk_data):
    captions = salad(seed=2, num_tokens=3000)
    vocabulary = Vocabulary()
    perceptron = Perceptron(vocabulary, find_resources())
    assert compiled_tags(perceptron, vocabulary, captions) == nltk_tags(captions)


@pytest.mark.parametrize(("name", "size"), [("llava_coco", 30), ("laion_alt_text", 250), ("vlm_other", 30)])
def test_equals_nltk_on_real_captions(nltk_data, name, size):
    if not (SHARED / "captions").is_dir():
        pytest.skip("no captions beside the repository")
    from nltk import word_tokenize

    texts = pq.read_table(SHARED / "captions" / f"{name}.parquet")["caption"].to_pylist()
    captions = [word_tokenize(text) for text in random.Random(0).sample(texts, size)]
    vocabulary = Vocabulary()
    perceptron = Perceptron(vocabulary, find_resources())
    assert compiled_tags(perceptron, vocabulary, captions) == nltk_tags(captions)


def test_equals_nltk_on_own_captions_with_equal_sums(nltk_data):
    from nltk import word_tokenize

    captions = [word_tokenize(text) for text in TIES]
    vocabulary = Vocabulary()
    assert compiled_tags(Perceptron(vocabulary, find_resources()), vocabulary, captions) == nltk_tags(captions)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # 0.1 + 0.2 is more than 0.3 in floats, though not in thousandths: JJ wins, the last of equal names would be NN.
        ({"bias": {"NN": 0.3, "JJ": 0.1}, "i suffix xyz": {"JJ": 0.2}}, "JJ"),
        # The order of features counts: 0.3 + 0.2 + 0.1 is 0.6, but 0.1 + 0.2 + 0.3 is more.
        ({"bias": {"NN": 0.6, "JJ": 0.3}, "i suffix xyz": {"JJ": 0.2}, "i word xyz": {"JJ": 0.1}}, "NN"),
        ({"bias": {"NN": 0.6, "JJ": 0.1}, "i suffix xyz": {"JJ": 0.2}, "i word xyz": {"JJ": 0.3}}, "JJ"),
        ({"bias": {"NN": 0.25, "JJ": 0.25}}, "NN"),
        (
            {"bias": {"NN": -0.3, "JJ": -0.1, **dict.fromkeys({*TAGS} - {"NN", "JJ"}, -1)}, "i pref1 x": {"JJ": -0.2}},
            "NN",
        ),
        # Classes without any weight have the sum 0 and the last name.
        ({"bias": {"NN": -0.5}}, "``"),
    ],
)
def test_equal_sums_are_settled_as_nltk_settles_them(weights, expected):
    from nltk.tag.perceptron import PerceptronTagger

    tagger = PerceptronTagger(load=False)
    tagger.decode_json_params((weights, {}, TAGS))
    assert [tag for _, tag in tagger.tag(["xyz"])] == [expected]
    vocabulary = Vocabulary()
    perceptron = Perceptron(vocabulary, resources_of(weights))
    assert compiled_tags(perceptron, vocabulary, [["xyz"]]) == [[expected]]


@pytest.mark.parametrize("place", range(14))
def test_each_feature_decides_where_it_should(place):
    """A model of a single feature: its tag appears exactly where NLTK puts it."""
    from nltk.tag.perceptron import PerceptronTagger

    words = ["One", "ties-up", "2024", "Ünsung", "3rd", "one", "two"]
    tagger = PerceptronTagger(load=False)
    tagger.decode_json_params(({"bias": {"NN": 0.1}}, {"two": "CD"}, TAGS))
    context = ["-START-", "-START2-", *map(tagger.normalize, words), "-END-", "-END2-"]
    found = 0
    for i in range(len(words)):
        before = ["-START2-", "-START-", *["NN"] * len(words)]
        feature = list(tagger._get_features(i, words[i], context, before[i + 1], before[i]))[place]
        weights = {"bias": {"NN": 0.1}, feature: {"VB": 0.2, "NN": 0.05}} if place else {"bias": {"VB": 0.2}}
        tagger.decode_json_params((weights, {"two": "CD"}, TAGS))
        vocabulary = Vocabulary()
        perceptron = Perceptron(vocabulary, resources_of(weights, fixed={"two": "CD"}))
        expected = [tag for _, tag in tagger.tag(words)]
        assert compiled_tags(perceptron, vocabulary, [words]) == [expected], feature
        found += expected.count("VB")
    assert found


@pytest.mark.parametrize("word", SHAPES)
def test_normal_forms_are_nltks(word):
    from nltk.tag.perceptron import PerceptronTagger

    assert normalise(word) == PerceptronTagger(load=False).normalize(word)


def test_no_tokens_no_tags(synthetic_nltk_data):
    vocabulary = Vocabulary()
    perceptron = Perceptron(vocabulary, find_resources())
    assert compiled_tags(perceptron, vocabulary, []) == []
    assert compiled_tags(perceptron, vocabulary, [[], ["dog"], []]) == [[], ["NN"], []]


def test_words_may_come_in_any_pieces(synthetic_nltk_data):
    captions = salad(seed=3, num_tokens=5000)
    vocabulary, pieces = Vocabulary(), Vocabulary()
    whole = compiled_tags(Perceptron(vocabulary, find_resources()), vocabulary, captions)
    perceptron = Perceptron(pieces, find_resources())
    assert [tags for caption in captions for tags in compiled_tags(perceptron, pieces, [caption])] == whole


def test_unknown_words_share_rows(synthetic_nltk_data):
    vocabulary = Vocabulary()
    perceptron = Perceptron(vocabulary, find_resources())
    compiled_tags(perceptron, vocabulary, salad(seed=4, num_tokens=5000))
    held, size_bytes = len(vocabulary), perceptron.size_bytes
    compiled_tags(perceptron, vocabulary, [[f"{i:x}blorft{i % 7}" for i in range(40_000)]])
    assert len(vocabulary) == held + 40_000
    assert perceptron.size_bytes - size_bytes <= 100 * 40_000


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (resources_of({"bias": {"NN": 0.1234}}), "weights.json: .*expected weights of three decimals"),
        (resources_of({"bias": {"NN": float("nan")}}), "expected weights of three decimals"),
        (resources_of({"bias": {"NN": 5000.0}, "i word x": {"NN": 5000.0}}), "expected sums of weights below 8388"),
        (resources_of({"bias": {"NOUN": 0.1}}), "weights.json: KeyError"),
        (resources_of({"bias": {"NN": "much"}}), "weights.json"),
        (resources_of({"i-1 tag NOUN": {"NN": 0.1}}), "weights.json: KeyError"),
        (resources_of([1, 2]), "weights.json"),
        (resources_of({}, classes=TAGS[:-1]), "classes.json: expected the 45 tags"),
        (resources_of({}, fixed={"the": "THE"}), "tagdict.json"),
        (Resources({WEIGHTS: b"{", CLASSES: json.dumps(TAGS).encode(), TAGDICT: b"{}"}), "weights.json: Expecting"),
        (Resources({WEIGHTS: b"{}", CLASSES: b"\xff", TAGDICT: b"{}"}), "classes.json"),
    ],
)
def test_data_that_exact_sums_cannot_use_is_refused(resources, message):
    with pytest.raises(DataError, match=message):
        Perceptron(Vocabulary(), resources)
