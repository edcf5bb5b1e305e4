"""Some hundred captions on which an engine has to agree with NLTK before it is trusted: the project's own sentences.

They hold what has gone wrong, or could: quotes, abbreviations, numbers, unknown words, and sums of weights that are
equal, where NLTK's rounding decides.
"""

import itertools
from collections.abc import Iterator

import pyarrow as pa

from pixart_data.tagging.blocks import TAGS, Block, Engine

_DENSE = """\
The image features a small brown dog that is lying on a wooden bench near the lake. Its ears are up, and it looks happy.
In the scene, there are several people standing around a large table, which is filled with plates, cups and bowls.
A woman in a blue coat (and a matching hat) holds an umbrella; it's raining, but she doesn't seem to mind at all.
Two giraffes are grazing in the background, while a zebra walks by. The overall atmosphere is calm and peaceful.
The kitchen has a stainless-steel sink, a black-and-white tiled floor, and a refrigerator covered in magnets.
There is a clock on the wall, close to the top left corner of the picture, showing ten past three.
A man riding a wave on top of a surfboard. He is wearing a wetsuit. The wave is about to break behind him!
Is that a cat? Yes, it is: a grey, long-haired cat, asleep inside an open suitcase.
The young boy can't reach the shelf, so he'll climb onto the chair that's next to it.
Apart from the main train, two other trains can be seen: one near the left side and another one further right.
Three slices of pizza remain on the plate. One is half-eaten. A fork, a knife and a napkin lie beside them.
The skateboarder's board has just left the ramp, and his friends' cameras are pointed at him.
An old-fashioned, hand-painted sign reads "Fresh Bread" above the bakery's door.
Her dress is red with white polka dots; her shoes, however, are neither red nor white.
A herd of sheep is grazing. Some of them are looking at the camera, others keep eating. None is alone.
The living room is cozy: a fireplace, two armchairs, a rug, and a bookshelf that holds more than fifty books.
Rows of bicycles are parked along the canal. Most of them have baskets. A few have been left lying on the ground.
As the sun sets, the beach empties, leaving only footprints, a forgotten ball and one set parasol.
The batter swings, the catcher waits, the umpire watches closely; the crowd cheers.
It appears to be a birthday party, with balloons, a cake, and children wearing paper hats.
"""

_RAW = """\
PHOTO | Vintage Poster / 24x36 in. <Framed> #art @home
Men's Slim-Fit Shirt - Navy Blue (XL), Size 42
IMG_2041.JPG
Buy 2, get 1 FREE!!! Only $19.99 + shipping & handling
Canon EOS 5D Mark IV w/ 24-105mm f/4L II Lens Kit
Paris, France: the Eiffel Tower at night, c. 1925
House for sale at 123 Main St. in St. Paul, MN 55101 USA
Dr. Smith and Mrs. Jones met Mr. Brown at 5 p.m. Nobody else came.
www.example.com/pictures?id=7&size=large
http://example.org - Free Download
Stock photo: happy family on sofa ... watching TV ...
1950s Chevrolet Bel-Air (restored) - 3/4 front view
Best Of 2019 / 2020 - Vol. 3 [Remastered]
Sunset@Beach #nofilter 100% real
The "Old Mill" - oil on canvas, 16"x20"
Rock 'n' Roll Hall of Fame, Cleveland, Ohio, U.S.A.
Kids' Room Decor Ideas: 10 DIY Projects You'll Love
iPhone 12/12 Pro Case, Clear, Anti-Scratch, 6.1"
Happy New Year's Eve!! (12/31)
Lot of 4,500 pcs. | No. 7 | Ref. A-113
T-Shirt Unisex S-3XL
Mt. Fuji from Lake Kawaguchi, Japan, Apr. 2014
Fig. 4: cross-section (not to scale)
the cheapest hotels in new york city
MCMXCIV Wall Clock, Ø 30 cm, 1,5 kg
e.g. apples, i.e. fruit, etc. and so on
J. R. R. Tolkien's "The Hobbit": First Edition
50's Diner Sign, '57 Chevy, 'tis the season
'Twas the night before Christmas ... gonna get a cat, wanna see?
I'd've said he'd cannot; lemme go, gimme that, d'ye know, more'n that
"""

_MARKS = """\
He said, "It's a dog." She said, 'No, it isn't.' They left.
"Wait!" cried Anna. "Where are you going?" "Home."
(One in brackets.) [Two in others.] {Three in braces.} <Four.>
A sentence ends here.Another begins without a space.
Ellipses... in the middle ... and at the end....
One -- two -- three - four --five-- six
a/b, c\\d, e|f, g~h, i^j, k_l, m*n, o=p, q+r
Prices: $5, 5$, US$5, 5 %, 5%, #5, & 5
Commas, 1,000, and 1,00, or ,5 and 5, here
Times: 10:30, 10: 30, a:b, ::, ;; and ;-)
''Two single quotes'' and ``two backticks'' and "straight" ones
It's the dogs' toy; the boy's, the boys', James's and who's who
don't Don't DON'T can't cannot won't shan't ain't o'clock y'all
he'Ll he'lL we'rE
I'm you're he's she'll we've they'd I'M YOU'RE HE'S
The U.S. is big. The U.S. army. An M.D. said so. A Ph.D. too.
Is it? It is! Is it?! It is... Is it ?
. A dot first. ? A question first. ! And so on .
" ' ` ( ) [ ] { } < > , ; : . ? !
- -- --- ---- . .. ... .... ..... ......
No. 5 is alive. No. It is not. See pp. 5-7 of vol. 2.
end." Next. end.' Next. end.) Next. end.] next. end.") Then.
(b?)Mr.) The cat
Wow!"Mr.) the cat
!HYPHEN !YEAR !DIGITS -START- -END- -START2-
"""

_NUMBERS_AND_WORDS = """\
1999 2024 1,999 19 199 19999 0 00 3.14 .5 5. 5th 21st 1990s '90s 1/2 3-4 -5 -5-6 5- 7e3 0x1F
well-known state-of-the-art - -dash dash- --x x-- a-b-c -a-b
blorft Blorft BLORFT blorfting blorfted blorfts blorftly blorftness un-blorft blorft's Blorftson
zzz Zzz ZZZ q Q x1 1x a1b2 A1 iX Xi xIx McBlorft O'Blorft
antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaft
I a A an An THE the The thE of OF Of and AND And
run ran runs running Run Ran Runs Running RUN RAN RUNS RUNNING
set put cut read left right light close open clean parked lit that like past back down
"""

_TIES = """\
Still several lit sign lets as a lamp cut.
Each close-up leans right! lets several sink.
Two vintage broken umbrella stands! its bat sits.
Several dog spread further? this dog stands right.
Makes nearby this lit light as three player looks still.
Several train hangs under a drink but several round light cut.
Several plate features together but some overall set run holds.
Several own upper remote runs very? another past fresh kite has.
This cut board lets under its bat but this tall empty plate looks.
Some lit vintage close-up shows; this own dark close-up read quite.
Its fluffy background hangs slowly, which another bright phone walks.
His set green swing lit across each sheep and some clean bat lets quite.
Leans one wooden bat two tall foreground off; two close frisbee spread.
The tall parked background put, while the tall close sink spread further.
His window leans around each round skateboarder? this close run still holds.
"""

_ODD = (
    "",
    " \n\t ",
    "A",
    ".",
    "\0",
    "a\0cat \0 sat",
    "“The cat’s on the ‘mat’,” said Anna — then she left. “Why?” he asked.",
    "«Bonjour», dit-il. „Guten Tag“, sagte sie.",
    "First line\nsecond line\n\nA third paragraph. \nA fourth one.\r\nAnd 'a fifth'\n",
    "Tabs\tand  double  spaces \u00a0 and\u2003wide ones\u3000here.",
    "It's'\n'quoted' by \"lines\"\n\"here\".",
    "😀 a dog 👨‍👩‍👧 and its bone 🦴! 🙂",
    "café naïve Ärzte straße ÆSOP İstanbul ǅ ﬁne Ünal ΑΘΗΝΑ ὈΔΥΣΣΕΎΣ москва",
    "東京タワー の 夜景。 서울 · 上海 北京 の写真！",
    "٣٤٥٦ ١٢ ½ ² x² ５００ Ⅳ ④ 100€ £5 ¥7 ₹9 5°C ±3 ×2",
    "½'e '½ '² x² ½. J ¾. Next, ①. And Ⅳ. Then '٣ 'é",  # nltk 3.10.3 takes these otherwise
    "\ufeffcat\u200b dog\u2028bird\u0301 fish\ufffd",
    "a" * 300 + " " + "-" * 50 + " " + "Mr. " * 20,
    "The cat sat on the mat. " * 12,
)

_WHO = ("The dog", "A Blorft", "3 men", "Mr. Jones", "She", "Nobody's friends")
_DOES = ("sits on", "isn't near", "was painted by", "re-enters", "sees")
_WHAT = ("the table.", "1984!", "U.S. soil", "an ex-wife's car?", '"it".')
GENERATED = tuple(" ".join(words) for words in itertools.product(_WHO, _DOES, _WHAT))

TIES = tuple(_TIES.splitlines())
"""With NLTK's published weights each holds a token with equal sums that the order of names decides otherwise."""

CAPTIONS = tuple(
    itertools.chain(
        *(block.splitlines() for block in (_DENSE, _RAW, _MARKS, _NUMBERS_AND_WORDS)), TIES, _ODD, GENERATED
    )
)

_SHOWN_CHARS = 60


def prove(engine: Engine, reference: Engine) -> list[str]:
    """Tag `CAPTIONS` with both engines and return where they differ, a line for each caption; [] if nowhere."""
    array = pa.array(CAPTIONS)
    pairs = zip(CAPTIONS, _read(engine, engine.tag(array)), _read(reference, reference.tag(array)), strict=True)
    return [f"{_shown(caption)}: {_first_difference(one, other)}" for caption, one, other in pairs if one != other]


_Reading = tuple[bool, list[tuple[str, str, int]]]


def _read(engine: Engine, block: Block) -> Iterator[_Reading]:
    """Yield, of each caption, whether it counts, and word, tag and begin of each token."""
    names = (*TAGS, "?")
    words = engine.vocabulary.surfaces(block.words).to_pylist()
    tokens = list(zip(words, (names[tag] for tag in block.tags), block.begins.tolist(), strict=True))
    for counted, start, stop in zip(block.counted.tolist(), block.offsets, block.offsets[1:], strict=False):
        yield counted, tokens[start:stop]


def _first_difference(one: _Reading, other: _Reading) -> str:
    if one[0] != other[0]:
        return f"counted {one[0]}, not {other[0]}"
    pairs = itertools.zip_longest(one[1], other[1])
    found, expected = next((found, expected) for found, expected in pairs if found != expected)
    return f"found {found}, expected {expected}"


def _shown(caption: str) -> str:
    return repr(caption if len(caption) <= _SHOWN_CHARS else f"{caption[:_SHOWN_CHARS]}...")
