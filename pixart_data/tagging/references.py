"""The engines in plain Python: NLTK itself, by which the compiled one is judged, and TextBlob's lexicon.

Both make one Python string of each caption and one of each token: some hundred captions a second.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from pixart_data.tagging.arrays import text_type
from pixart_data.tagging.blocks import OTHER_TAG, TAGS, Block
from pixart_data.tagging.sentences import patiently
from pixart_data.tagging.vocabulary import Vocabulary

Tagged = Iterable[list[tuple[str, str]]]
"""The (word, tag) pairs of a caption, sentence by sentence."""

_TAG_IDS = {tag: number for number, tag in enumerate(TAGS)}
_SENTENCE_GAP = re.compile(r"(?<=[.?!])[\"'”’)\]]{0,2}\s++(?=[\"'“‘(\[]{0,2}[A-Z])")
_NO_SENTENCE_END = re.compile(
    r"(?:\b[A-Za-z]|\b(?:Mr|Mrs|Ms|Dr|St|Mt|Jr|Sr|Prof|Gen|Capt|No|Vol|vs|etc|Inc|Co|Ltd))\.$"
)
_ABBREVIATION_CHARS = 8


def nltk_name() -> str:
    """Return the name of both engines that give NLTK's answer."""
    return f"nltk {version('nltk')} averaged_perceptron_tagger_eng"


def well_formed(text: str) -> str:
    """Return the text as Arrow can hold it: surrogate pairs joined, and lone surrogates as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class NltkEngine:
    """NLTK as it is installed: `pos_tag(word_tokenize(caption))`.

    NLTK keeps its models for the life of the process: data that moves afterwards is not seen.

    Args:
        vocabulary: Where the words go, if not into one of its own.

    Raises:
        LookupError: If NLTK's data files are missing; `engines.open_engine` says so more helpfully.
    """

    approximate = False

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        import nltk

        self.vocabulary = Vocabulary() if vocabulary is None else vocabulary
        self._builder = _Builder(self.vocabulary)
        self._nltk = nltk
        nltk.pos_tag(nltk.word_tokenize("A cat."))

    @property
    def name(self) -> str:
        """Library, version, model."""
        return nltk_name()

    def tag(self, captions: pa.Array | pa.ChunkedArray) -> Block:
        """Tag captions one at a time; see `blocks.Engine.tag`."""
        return self._builder.build(captions, functools.partial(patiently, self._tagged))

    def _tagged(self, caption: str) -> Tagged:
        nltk = self._nltk
        sentences = [nltk.word_tokenize(sentence, preserve_line=True) for sentence in nltk.sent_tokenize(caption)]
        tagged = iter(nltk.pos_tag(list(itertools.chain.from_iterable(sentences))))
        return [list(itertools.islice(tagged, len(sentence))) for sentence in sentences]


class TextBlobEngine:
    """The lexicon inside the TextBlob package, on NLTK's word tokenizer and sentence ends by rule: no data needed.

    Nouns per caption differ from NLTK's by up to about 3%, distinct nouns by up to about 13%.
    """

    approximate = True

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        from nltk.tokenize import NLTKWordTokenizer
        from textblob.en import parser

        self.vocabulary = Vocabulary() if vocabulary is None else vocabulary
        self._builder = _Builder(self.vocabulary)
        self._tokenize: Callable[[str], list[str]] = NLTKWordTokenizer().tokenize
        self._find_tags: Callable[[list[str]], list[list[str]]] = parser.find_tags

    @property
    def name(self) -> str:
        """Library, version, what of it, and that it is approximate."""
        return f"textblob {version('textblob')} lexicon (approximate)"

    def tag(self, captions: pa.Array | pa.ChunkedArray) -> Block:
        """Tag captions one at a time; see `blocks.Engine.tag`."""
        return self._builder.build(captions, self._tagged)

    def _tagged(self, caption: str) -> Tagged:
        for sentence in _sentences(caption):
            # Some forty entries of the lexicon name several tags, as in `NN|JJ`.
            yield [(word, tag.partition("|")[0]) for word, tag in self._find_tags(self._tokenize(sentence))]


class _Builder:
    """Puts the tokens of captions into a `Block`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: dict[str, int] = {}

    def build(self, captions: pa.Array | pa.ChunkedArray, tagged: Callable[[str], Tagged]) -> Block:
        words: list[int] = []
        tags: list[int] = []
        begins: list[int] = []
        offsets, counted = [0], []
        for caption in texts(captions):
            counted.append(caption is not None and bool(caption.strip()))
            for sentence in tagged(caption) if caption and counted[-1] else ():
                words += [self._id(word) for word, _ in sentence]
                tags += [_TAG_IDS.get(tag, OTHER_TAG) for _, tag in sentence]
                begins += [int(i == 0) for i in range(len(sentence))]
            offsets.append(len(words))
        return Block(
            np.array(words, np.int32),
            np.array(tags, np.uint8),
            np.array(offsets, np.int64),
            np.array(begins, np.uint8),
            np.array(counted, np.bool_),
        )

    def _id(self, word: str) -> int:
        found = self._ids.get(word)
        if found is None:
            found = self._ids[word] = self._vocabulary.intern(word)
        return found


def texts(captions: pa.Array | pa.ChunkedArray) -> Iterator[str | None]:
    """Yield captions as Python strings; each stretch of bytes that are no UTF-8 as U+FFFD.

    Raises:
        DataError: If the array is not one of texts.
    """
    kind = text_type(captions)
    try:
        yield from captions.to_pylist()
    except UnicodeDecodeError:
        raw: list[Any] = captions.cast(kind).cast(pa.large_binary()).to_pylist()
        yield from (None if value is None else value.decode("utf-8", "replace") for value in raw)


def _sentences(caption: str) -> list[str]:
    """Split after . ? ! where a capital follows, abbreviations and initials excepted."""
    sentences, start = [], 0
    for gap in _SENTENCE_GAP.finditer(caption):
        before = caption[max(start, gap.start() - _ABBREVIATION_CHARS) : gap.start()]
        if not _NO_SENTENCE_END.search(before):
            sentences.append(caption[start : gap.end()])
            start = gap.end()
    return [*sentences, caption[start:]]
