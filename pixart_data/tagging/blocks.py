"""What engines give: the words and tags of many captions in flat arrays."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.tagging.vocabulary import Vocabulary

# fmt: off
TAGS = (
    "#", "$", "''", "(", ")", ",", ".", ":", "CC", "CD", "DT", "EX", "FW", "IN", "JJ", "JJR", "JJS", "LS", "MD", "NN",
    "NNP", "NNPS", "NNS", "PDT", "POS", "PRP", "PRP$", "RB", "RBR", "RBS", "RP", "SYM", "TO", "UH", "VB", "VBD", "VBG",
    "VBN", "VBP", "VBZ", "WDT", "WP", "WP$", "WRB", "``",
)
# fmt: on
"""The Penn Treebank's tags as NLTK's tagger names its classes, sorted: the order in which it breaks ties."""

OTHER_TAG = len(TAGS)
"""Stands for a tag that is not among `TAGS`: some entries of TextBlob's lexicon."""

NOUN_TAGS = ("NN", "NNP", "NNPS", "NNS")


@dataclass(frozen=True)
class Block:
    """The tokens of some captions, one caption after another.

    Attributes:
        words: Ids in the engine's vocabulary, (T,).
        tags: Positions in `TAGS`, (T,).
        offsets: Where each caption's tokens begin, and the end of the last one's, (N + 1,).
        begins: 1 where a token is the first of a sentence, (T,).
        counted: False for null and blank captions, which no figure is taken of, (N,).
    """

    words: npt.NDArray[np.int32]
    tags: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    begins: npt.NDArray[np.uint8]
    counted: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """The number of captions."""
        return len(self.counted)


class Engine(Protocol):
    """Tags captions. It is not safe to share between threads, and not to be pickled: a worker opens its own."""

    vocabulary: Vocabulary

    @property
    def name(self) -> str:
        """What goes beside every figure: library, version, model. Two engines of one name give the same tags."""

    @property
    def approximate(self) -> bool:
        """Whether figures must be marked, and kept apart from NLTK's."""

    def tag(self, captions: pa.Array | pa.ChunkedArray) -> Block:
        """Tag captions one at a time, as NLTK does; their words join the vocabulary.

        Args:
            captions: Of type string, large_string, string_view or null; nulls are allowed. Bytes that are no UTF-8
                count as U+FFFD.

        Raises:
            DataError: If the array is of another type.
        """
