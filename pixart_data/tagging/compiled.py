"""The engine in compiled code: NLTK's tokens and tags, always, some hundred times as fast."""

import pyarrow as pa

from pixart_data.tagging.blocks import Block
from pixart_data.tagging.perceptron import Perceptron
from pixart_data.tagging.references import nltk_name
from pixart_data.tagging.resources import Resources
from pixart_data.tagging.tokenizer import Tokenizer
from pixart_data.tagging.vocabulary import Vocabulary


class CompiledEngine:
    """Tags captions as `nltk.pos_tag(nltk.word_tokenize(caption))` does; `blocks.Engine` says how it is used.

    Its lists and weights are the user's own of NLTK: Punkt's by way of NLTK, the tagger's as `resources` read them.

    Args:
        resources: NLTK's data files, those that NLTK finds, too.
        vocabulary: Where the words go, if not into one of its own.

    Raises:
        LookupError: If NLTK does not find its files.
        DataError: If they are not what the compiled rules hold for; NLTK may well read them.
    """

    approximate = False

    def __init__(self, resources: Resources, vocabulary: Vocabulary | None = None) -> None:
        self.vocabulary = Vocabulary() if vocabulary is None else vocabulary
        self.tokenizer = Tokenizer(self.vocabulary)
        self._perceptron = Perceptron(self.vocabulary, resources)

    @property
    def name(self) -> str:
        """Library, version, model: NLTK's, whose answer it gives."""
        return nltk_name()

    def tag(self, captions: pa.Array | pa.ChunkedArray) -> Block:
        """Tag captions one at a time; see `blocks.Engine.tag`."""
        words, offsets, begins, counted = self.tokenizer.tokenize(captions)
        return Block(words, self._perceptron.tag(words, offsets), offsets, begins, counted)
