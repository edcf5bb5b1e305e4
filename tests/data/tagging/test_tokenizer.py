"""The compiled tokenizer against NLTK's: tokens, sentences, and every form that captions come in."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.errors import DataError
from pixart_data.tagging.compiled import CompiledEngine
from pixart_data.tagging.proof import CAPTIONS
from pixart_data.tagging.references import NltkEngine
from pixart_data.tagging.resources import find_resources
from pixart_data.tagging.tokenizer import Tokenizer
from pixart_data.tagging.vocabulary import Vocabulary
from tests.conftest import SHARED

# Each line is one caption; `\n`, `\t`, `\N{...}` and the like stand for what they name.
NASTY = r"""
"Hello," she said. "It's me." 'Really?' 'Yes.' ''Two'' ``three`` "four
He said "no", then ("yes"), then [“maybe”], then <"never"> and {"ever"}.
"Quote at the start". 'Another.' "" '' `` ` ' "
 "Quote after a space" \t"after a tab" \n"after a line"
 'single after a space' \n'after a line' it's'\nno ' \n' '
It's'\n'quoted' by \"lines\"\n\"here\".
the dogs' toys, the dogs'\ntoys, the dogs'\ttoys, the dogs'
O'Neil's rock'n'roll 'n' 'em 'tis 'twas 'Tis'Twas 'twas'tis cannot'tis 'tisn't
d'ye D'YE more'n MORE'N gimme'n wanna-be wanna. gonna, (gotta) lemme! cannot; x-cannot-y cannots _cannot
can't CAN'T cann't n't N'T 'll 'LL 'Ll I'd've y'all'd've he's's she'd'd we'm
he'Ll he'lL we'rE
Ends with a quote.' Ends with two.'' Ends with a double."
(Closes.) [Closes.] {Closes.} <Closes.> «Closes.» “Closes.” ‘Closes.’ Closes.”’ Closes.)]}>"'»
Stop . ) Stop. ) Stop.) ) Stop. " Stop. ' and so on
Stop. )
Stop . ' "
Stop. ' ) ] }
) ] } > " '
. ) . ) .
Hello.World Hello?World Hello!World Hello."World Hello.'World Hello.)World Hello.:World Hello.*x
Hello!"--and so. Hello."--and so. Hello." --and so. Hello.)-- (so)
What?! No!!! Oh... Hm.. Well... And ...then? !!! ??? ?! .
New !! Wireless !? Motion ?! Nothing . ... .. . ..
!!'LIKE' THIS ON THAT! !" !' .' ." ?) !)
 !! at the start of a line
wow!!!
wow!!!"
wow." )
wow. ) next
wow." ) next
wow.) ( next
Mr. Smith met Mrs. Jones, Dr. Who, St. Paul and No. 5. No. It is 5. Then 6.
(b?)Mr.) The cat
Wow!"Mr.) the cat
Mr.) Smith (Mr.) and Inc.) or Inc.: or Inc.; or U.S.A.' or e.g.! yes
J. R. R. Tolkien. J. Walter Thompson. I. Asimov. A. And B. the C. Next
J.) and J.; and J.: and J.' and 5.) and 5.; and 5.: and 5.' and v.5.)
At 5 p.m. We left. At 5 p.m. we left. In the U.S. The end. In Jan. 2019. In Jan. It rained.
pp. 5-7. cf. Fig. 3. approx. 50. et al. 2019. vs. Them. Ph.D. A. Ph.D.-level. sub-Dr. Who. x-Inc. Then
3.14 3. Then 3. then 1,000. Then 1,000. then -5. Then .5. Then #1. Then $5. Then 5%. Then ½. Then ٣. Then ٣. then
a,b a, b a ,b ,, , a,, a,1 1,a 1,1 :: a:b a: b :) :-) ;) 10:30 10: 30 x,:y
... a... a...b a..b ..a a.. .a. ..' ...) a...) a..." "...a
-- a--b a -- b --- ---- a-b -a a- - –a a–b — ―x a‒b
a@b.c #tag $5 5$ US$5 5% 100%. & &amp; a&b; ; a;b a*b ** [*] (a)b(c) <b>bold</b> {x}
a/b/c \\d e|f g~h i^j k_l _m_ n=o +p p+ `q` ``r´ s¨t
“Curly ‘inside’ curly,” said «Anna». „Low“ ‚low‘ ‹x› “x”y ‘x’y x‘y’
“Is it?” “It is!” “It is.” “It is”. ‘So?’ ‘So.’ So.’ ’Tis ’twas ’s don’t
don’t It’s the dogs’ toys. “The cat’s”
No-break\u00a0space here.\u00a0There. St.\u00a0Louis is.\u00a0Really big. a\u00a0b \u00a0c\u00a0\u00a0d \u00a0 e
Wide\u2003space\u3000here.\u2003There. thin\u2009one\u202fnarrow \u2028line\u2029paragraph\x0bvertical\x0cform
Zero\u200bwidth\u200d joiner \ufeffmark soft\u00adhyphen \u2060word
Next\x85line unit\x1fseparator group\x1dend \x1c file \x00 nul\x00in it\x00. Then \x7f del
combi\u0301ned e\u0301. Then a\u0308' \u0301 \u0301. (\u0301)
İstanbul ıssız ſt ſ 'ſ 'ſt KELVIN\u212a \u212a. ẞ ﬁ ǅ ß. Then ǰ' ŉ 'ŉ
москва. Потом ушёл. Он — «там». 東京。京都. 次 中文! 好 서울. 네 मुंबई. फिर العربية. ثم ١٢٣. ثم
😀. 👍 👨\u200d👩\u200d👧! 🇫🇷? \U00020000 \U00020000. \U0001f600's 😀' '😀
½. ². Ⅳ. ④ ⅷ. x². 5°. №5. ª º. ª.
http://a.b/c?d=e&f#g. www.a.b! a.b.c. a.b.c.! x@y.z. C:\\dir\\file.txt. file.JPG IMG_1.png,
24-105mm f/2.8 16"x20" 5'10" 6' 6". '90s 90's 1990s' 'til rock 'n' roll
a\tb\nc\rd\r\ne\n\nf\t\tg \t h
 leading
trailing \n\t
\n\n"lines"\n\n'lines'\n.\n)\n
.
"
'
''
'''
)
!
?!
..
...
:
,
`
``
```
--
's
n't
cannot
'tis
a.
a"
".
.'
).
.)
("(
"""


def _captions():
    lines = [
        line.encode("latin-1", "backslashreplace").decode("unicode_escape") for line in NASTY.strip("\n").split("\n")
    ]
    return [*lines, *CAPTIONS]


class Nltk:
    """What NLTK says of one caption: its words, and which begin sentences."""

    def __init__(self):
        from nltk.tokenize import NLTKWordTokenizer, PunktTokenizer

        self.sentences, self.words = PunktTokenizer().tokenize, NLTKWordTokenizer().tokenize

    def __call__(self, caption):
        sentences = [self.words(sentence) for sentence in self.sentences(caption)] if (caption or "").strip() else []
        return [(word, i == 0) for sentence in sentences for i, word in enumerate(sentence)]


@pytest.fixture
def nltk_says(nltk_data):
    return Nltk()


@pytest.fixture
def tokenizer(nltk_data):
    return Tokenizer(Vocabulary())


def read(tokenizer, array):
    """The tokens of each caption, and whether they begin a sentence."""
    tokens = tokenizer.tokenize(array)
    words = tokenizer.vocabulary.surfaces(tokens.words).to_pylist()
    pairs = list(zip(words, (bool(begin) for begin in tokens.begins), strict=True))
    return [pairs[start:stop] for start, stop in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def test_own_sentences_one_by_one(tokenizer, nltk_says):
    captions = _captions()
    assert len(captions) > 350
    for caption, found in zip(captions, read(tokenizer, pa.array(captions)), strict=True):
        assert found == nltk_says(caption), repr(caption)
    assert 0 < tokenizer.num_declined < 0.2 * tokenizer.num_captions  # most of them by compiled code


def test_words_do_not_hang_on_their_neighbours(tokenizer, nltk_says):
    # The table of chunks fills in another order, with each chunk in other places than when it was first seen.
    pieces = [piece for caption in _captions() for piece in caption.split(" ")]
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(pieces, 6)) for _ in range(600)]
    read(tokenizer, pa.array(captions[::-1]))
    for caption, found in zip(captions, read(tokenizer, pa.array(captions)), strict=True):
        assert found == nltk_says(caption), repr(caption)


def test_words_that_punkt_keeps_together(synthetic_nltk_data):
    # NLTK's own list has no pair whose first word would end its sentence anywhere else; the miniature has one.
    captions = ["This is fine. Art follows.", "This is fine. Dogs follow.", "He is fine. Art! It follows."]
    nltk_says = Nltk()
    expected = [nltk_says(caption) for caption in captions]
    assert [sum(begins for _, begins in caption) for caption in expected] == [1, 2, 2]
    assert read(Tokenizer(Vocabulary()), pa.array(captions)) == expected


def test_plain_english_needs_no_nltk(tokenizer):
    read(
        tokenizer, pa.array(["A dog's ball, (red) and round. It isn't \"new\"; is it? No. 5 is! Mr. X-Ray said so..."])
    )
    assert (tokenizer.num_captions, tokenizer.num_declined) == (1, 0)


def _dictionary(captions):
    return pa.array(captions, pa.string()).dictionary_encode()


@pytest.mark.parametrize(
    "make",
    [
        lambda captions: pa.array(captions, pa.string()),
        lambda captions: pa.array(captions, pa.large_string()),
        lambda captions: pa.array(captions, pa.string_view()),
        _dictionary,
        lambda captions: pa.array(["No. 1", *captions, "Mr."], pa.string())[1:-1],
        lambda captions: pa.array(["No. 1", None, *captions, "Mr."], pa.large_string())[2:-1],
        lambda captions: pa.chunked_array([captions[:3], [], captions[3:]], pa.string()),
        lambda captions: pa.chunked_array([captions[:3], captions[3:]], pa.string_view()),
        lambda captions: pa.chunked_array([_dictionary(captions[:2]), _dictionary(captions[2:])]),
    ],
)
def test_all_arrays_of_texts_are_read(tokenizer, nltk_says, make):
    captions = ["A cat.", None, "", " \n\t\u00a0 ", "It's “so”.", None, "\u2003", "東京 😀\0"]
    array = make(captions)
    assert read(tokenizer, array) == [nltk_says(caption) for caption in captions]
    assert tokenizer.tokenize(array).counted.tolist() == [True, False, False, False, True, False, False, True]


def test_no_captions_and_nothing_but_nulls(tokenizer):
    for array in (
        pa.array([], pa.string()),
        pa.chunked_array([], pa.large_string()),
        pa.nulls(3),
        pa.nulls(3, pa.string()),
    ):
        tokens = tokenizer.tokenize(array)
        assert tokens.offsets.tolist() == [0] * (len(array) + 1)
        assert tokens.counted.tolist() == [False] * len(array)
        assert len(tokens.words) == len(tokens.begins) == 0


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer, nltk_says):
    raw = [b"A \xff cat.", None, b"caf\xc3", b"\xed\xa0\x80 dog", "é".encode()]
    array = pa.Array.from_buffers(pa.string(), 5, pa.array(raw, pa.binary()).buffers())
    expected = [nltk_says(None if value is None else value.decode("utf-8", "replace")) for value in raw]
    assert read(tokenizer, array) == expected


def test_other_arrays_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"captions: expected texts, found int64; name the column"):
        tokenizer.tokenize(pa.array([1, 2]))
    with pytest.raises(DataError, match="found binary"):
        tokenizer.tokenize(pa.array([b"a"]))


def test_a_full_table_starts_anew_and_says_the_same(nltk_says):
    captions = [f"Mr. N{i} has {i}. Then {i % 7} dogs' toys, 'no.{i % 90}'." for i in range(3000)]
    small, large = (Tokenizer(Vocabulary(), max_chunks) for max_chunks in (40, 1 << 20))
    found = []
    for start in range(0, len(captions), 500):
        found += read(small, pa.array(captions[start : start + 500]))
    assert small.num_clearances > 2
    assert large.num_clearances == 0
    assert found == read(large, pa.array(captions))
    assert found[::100] == [nltk_says(caption) for caption in captions[::100]]


def test_many_new_words_and_long_captions(tokenizer, nltk_says):
    captions = [
        " ".join(f"w{i}x{k}." for k in range(40))
        for i in range(1200)  # 48,000 chunks: all tables grow
    ]
    captions += ["dog" * 200 + " end. Then", "dog " * 17_000, "x.y" * 20_000, "'" * 390, ".:" * 199, '`"' * 199]
    found = read(tokenizer, pa.array(captions))
    for number in (0, 700, 1199, *range(1200, len(captions))):
        assert found[number] == nltk_says(captions[number]), captions[number][:50]
    assert tokenizer.num_declined == 4  # all but those with apostrophes and backticks


def test_every_real_caption_is_tagged_as_nltk_tags_it(nltk_data):
    folder = SHARED / "captions"
    names = sorted(folder.glob("*.parquet"))
    captions = [pq.read_table(name)["caption"].cast(pa.string()) for name in names] or [pa.chunked_array([CAPTIONS])]
    engine = CompiledEngine(find_resources())
    reference = NltkEngine(engine.vocabulary)
    for column in captions:
        found, expected = engine.tag(column), reference.tag(column)
        for name in ("counted", "offsets", "words", "begins", "tags"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    if names:
        assert engine.tokenizer.num_declined < 0.02 * engine.tokenizer.num_captions


def test_the_engine_has_nltks_name(nltk_data):
    engine = CompiledEngine(find_resources())
    assert engine.name == NltkEngine().name
    assert not engine.approximate
