"""What NLTK's patterns ask of characters, in one table by code point.

Which characters are words, digits or white space is asked of the very engines that NLTK's patterns run on: its own go
through the package `regex`, its contractions through `re`, and the two disagree on thousands of characters.
"""

import re

import numpy as np
import numpy.typing as npt

# A character's traits, as bits. Where a rule names characters, the bit bears the name of what the rule takes them for.
WORD = 1  # \w of `regex`
CONTRACTED = 1 << 1  # \w of `re`, which finds the contractions
DIGIT = 1 << 2
OPENER = 1 << 3  # starting quotes other than the straight ones
SYMBOL = 1 << 4
MARK = 1 << 5  # ? !
BRACKET = 1 << 6  # and the asterisk
ENDING_QUOTE = 1 << 7
CLOSER = 1 << 8  # may stand between the last full stop and the end of its sentence
STOP = 1 << 9  # .
COLON = 1 << 10  # : ,
APOSTROPHE = 1 << 11
DOUBLE_QUOTE = 1 << 12
HYPHEN = 1 << 13
QUOTED = 1 << 14  # a straight quote after one of these opens
SEPARATE = 1 << 15  # Punkt: no word holds it, so that the one before it ends
ALONE = 1 << 16  # Punkt: a word of one character
REALIGNED = 1 << 17  # Punkt: goes with the sentence before
CLAUSE = 1 << 18  # Punkt: , : ; . ? !
BACKTICK = 1 << 19
UNSURE = 1 << 20  # a caption that holds one goes to NLTK

RULED = OPENER | BACKTICK | SYMBOL | MARK | BRACKET | ENDING_QUOTE | STOP | COLON | APOSTROPHE | DOUBLE_QUOTE | HYPHEN
"""A chunk without any of these is a word as it is, but for contractions such as `cannot`."""

NUM_CHARACTERS = 0x20000
"""Characters from here on, rare ideographs, are unsure, too."""

# These become, or match, another letter when case is ignored, not in every engine alike.
_FOLDED = "\u0130\u0131\u017f\u1e9e\u212a"
_SETS = (
    (OPENER, "«“‘„"),
    (SYMBOL, ";@#$%&\u2012\u2013\u2014\u2015"),
    (MARK, "?!"),
    (BRACKET, "[](){}<>*"),
    (ENDING_QUOTE, "»”’"),
    (CLOSER, "])}>\"'»”’"),
    (STOP, "."),
    (COLON, ":,"),
    (APOSTROPHE, "'"),
    (DOUBLE_QUOTE, '"'),
    (HYPHEN, "-"),
    (BACKTICK, "`"),
    (QUOTED, " ([{<"),
    (SEPARATE, ")\";}]*:@'({[‘’“”«»?!"),
    (ALONE, '("`{[:;&#*@)}]-,'),
    (REALIGNED, "\"')]}‘’“”«»"),
    (CLAUSE, ";:,.!?"),
    (UNSURE, _FOLDED),
)


def table() -> npt.NDArray[np.uint32]:
    """Return each character's traits, by code point, (NUM_CHARACTERS,)."""
    from nltk import redos

    traits = np.zeros(NUM_CHARACTERS, np.uint32)
    everything = "".join(chr(code) for code in range(NUM_CHARACTERS) if not 0xD800 <= code < 0xE000)
    for bit, found in (
        (WORD, redos.compile(r"\w").findall(everything, timeout=None)),
        (CONTRACTED, re.findall(r"\w", everything)),
        (DIGIT, redos.compile(r"\d").findall(everything, timeout=None)),
        (UNSURE, redos.compile(r"\s").findall(everything, timeout=None)),
        (UNSURE, [char for char in everything if char.isspace() or char < " "]),
        *_SETS,
    ):
        traits[[ord(char) for char in found]] |= np.uint32(bit)
    for char in " \t\n\r":
        traits[ord(char)] &= np.uint32(~UNSURE & 0xFFFFFFFF)
    return traits
