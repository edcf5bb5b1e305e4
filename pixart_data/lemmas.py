"""Nouns by their dictionary form: WordNet where the user's NLTK data holds it, else a rule for plurals."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Lemmatizer:
    """Maps lower-case nouns to their lemmas, each distinct noun once.

    Attributes:
        rule: What distinct nouns are then, in words, for every output that shows their figures.
        plurals_only: Whether it is only asked about nouns tagged as plurals.
    """

    rule: str
    plurals_only: bool
    lemma: Callable[[str], str]

    def __call__(self, nouns: pa.Array, plural: Any) -> pa.Array:
        """Return the lemma of each noun.

        Args:
            nouns: Lower-case, of type large_string, (V,).
            plural: Whether the tag is that of a plural, (V,).
        """
        asked = plural if self.plurals_only else pc.is_valid(nouns)
        encoded = nouns.filter(asked).dictionary_encode()
        if not len(encoded):
            return nouns
        lemmas = pa.array([self.lemma(noun) for noun in encoded.dictionary.to_pylist()], nouns.type)
        return pc.replace_with_mask(nouns, asked, lemmas.take(encoded.indices))


def find_lemmatizer() -> Lemmatizer:
    """Return NLTK's `WordNetLemmatizer` where its data is found whole, else TextBlob's in-package rule for plurals."""
    from nltk.corpus import wordnet
    from nltk.corpus.reader.wordnet import WordNetError
    from nltk.stem import WordNetLemmatizer

    try:
        number = wordnet.get_version()
    except (LookupError, OSError, ValueError, AssertionError, WordNetError):
        from textblob.en.inflect import singularize

        rule = f"lower-cased surfaces, plurals (NNS, NNPS) as TextBlob {version('textblob')} makes them singular"
        return Lemmatizer(rule, plurals_only=True, lemma=lambda noun: str(singularize(noun)))
    rule = f"lemmas of lower-cased surfaces by NLTK's WordNetLemmatizer and WordNet {number}"
    return Lemmatizer(rule, plurals_only=False, lemma=WordNetLemmatizer().lemmatize)
