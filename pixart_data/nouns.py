"""Noun statistics of captions, as in Table 1 of the PixArt-alpha paper.

Definition. A noun is a token that `pos_tag(word_tokenize(caption))` of the installed NLTK tags NN, NNS, NNP or NNPS:
original-case text, one caption at a time. Counts are kept for each (surface, tag). Distinct nouns (DN) are lower-cased
surfaces; valid nouns (VN) are the distinct nouns that appear more than 10 times. The paper names NLTK and the
threshold; the tokeniser and the case folding are choices made here.

Without NLTK's data files there is an approximate mode: the lexicon inside the TextBlob package. Its averages differ
from NLTK's by up to about 3% and its DN by up to about 13%, so counts of the two are never merged and its figures are
marked.

NLTK and TextBlob are imported where they are used: importing this module is cheap.
"""

import functools
import io
import itertools
import json
import logging
import re
import socket
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.metadata import version
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import pyarrow as pa

from pixart_data.errors import ConfigError, DataError
from pixart_data.records import NOUNS

NOUN_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS"})
THRESHOLD = 10
TOP_NOUNS = 30

_COUNTED = (
    f"tagged NN, NNS, NNP or NNPS, one caption at a time, in its original case. Distinct nouns (DN) are lower-cased "
    f"surfaces; valid nouns (VN) are distinct nouns that appear more than {THRESHOLD} times."
)
DEFINITION = f"A noun is a token of NLTK's pos_tag(word_tokenize(caption)) {_COUNTED}"
APPROXIMATE_DEFINITION = f"Approximate: a noun is a token (NLTK's word tokenizer) by TextBlob's lexicon {_COUNTED}"

Kind = Literal["nltk", "textblob"]
Noun = tuple[str, str]
"""(surface, tag)."""

_log = logging.getLogger(__name__)
_METADATA = b"pixart.nouns"
_CONNECT_TIMEOUT_S = 5.0
_RESOURCES = {
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng/",
    "punkt_tab": "tokenizers/punkt_tab/english/",
}
_REMEDY = f"run `python -m nltk.downloader {' '.join(_RESOURCES)}`, or set NLTK_DATA to a folder that holds both"

_SENTENCE_GAP = re.compile(r"(?<=[.?!])[\"'”’)\]]{0,2}\s++(?=[\"'“‘(\[]{0,2}[A-Z])")
_NO_SENTENCE_END = re.compile(
    r"(?:\b[A-Za-z]|\b(?:Mr|Mrs|Ms|Dr|St|Mt|Jr|Sr|Prof|Gen|Capt|No|Vol|vs|etc|Inc|Co|Ltd))\.$"
)
_ABBREVIATION_CHARS = 8


@dataclass(frozen=True)
class Tagger:
    """Finds the nouns of a caption; small to pickle, its model is loaded once in each process that uses it.

    Make one with `find_tagger`, and in a worker with `build_tagger(tagger.kind)`.
    """

    kind: Kind

    @property
    def name(self) -> str:
        """What goes beside every figure: library, version, model."""
        if self.kind == "nltk":
            return f"nltk {version('nltk')} averaged_perceptron_tagger_eng"
        return f"textblob {version('textblob')} lexicon (approximate)"

    @property
    def approximate(self) -> bool:
        """Whether figures must be marked, and kept apart from NLTK's."""
        return self.kind != "nltk"

    def nouns(self, caption: str) -> list[Noun]:
        """Return the nouns in reading order, repeats included; lone surrogates in the caption become U+FFFD."""
        return [(surface, tag) for surface, tag in _tag_function(self.kind)(_well_formed(caption)) if tag in NOUN_TAGS]


def find_tagger(download: bool = True, approximate: bool = False) -> Tagger:
    """Return NLTK's tagger where its data files are found or can be had, else TextBlob's, with a logged warning.

    Args:
        download: Let NLTK download missing files, as `nltk.download` does, to its usual folder.
        approximate: Take TextBlob's lexicon without looking for NLTK's files.

    Raises:
        DataError: If NLTK's files are there but damaged.
    """
    if approximate:
        return build_tagger("textblob")
    try:
        return build_tagger("nltk", download=download)
    except ConfigError as error:
        tagger = build_tagger("textblob")
        _log.warning("%s; until then nouns are counted with %s", error, tagger.name)
        return tagger


def build_tagger(kind: Kind, download: bool = False) -> Tagger:
    """Return the tagger of a kind decided before, with its model loaded and tried out.

    Raises:
        ConfigError: If NLTK's data files are missing on this machine.
        DataError: If they are there but damaged.
    """
    if kind == "nltk":
        _require_nltk_data(download)
    tagger = Tagger(kind)
    try:
        tagger.nouns("The cat sat on a mat.")
    except (LookupError, ValueError, OSError) as error:
        why = " ".join(str(error).replace("*", "").split())[:200]
        raise DataError(f"noun tagger: {tagger.name} is damaged ({why}); delete its files and {_REMEDY}") from error
    return tagger


@dataclass
class NounCounts:
    """What counting has found so far; counts of parts merge into the counts of the whole.

    Attributes:
        num_captions: Captions counted; the denominator of nouns per image.
        num_empty: Null or blank captions, left out of `num_captions`.
    """

    tagger: str
    approximate: bool
    num_captions: int = 0
    num_empty: int = 0
    table: Counter[Noun] = field(default_factory=Counter)

    def merge(self, other: "NounCounts") -> Self:
        """Add `other` to these counts, in place and at a cost proportional to `other`, and return them.

        Raises:
            DataError: If the two come from different taggers.
        """
        if self.tagger != other.tagger:
            raise DataError(
                f"noun counts: expected all from one tagger, found {self.tagger} and {other.tagger}; "
                "their figures do not add up: count again with one of them"
            )
        self.num_captions += other.num_captions
        self.num_empty += other.num_empty
        self.table.update(other.table)
        return self

    def to_table(self) -> pa.Table:
        """Return the counts in the schema `NOUNS`, sorted; what is not a column travels as schema metadata."""
        rows = sorted(self.table.items())
        facts = {
            "tagger": self.tagger,
            "approximate": self.approximate,
            "num_captions": self.num_captions,
            "num_empty": self.num_empty,
        }
        columns = [[noun[0] for noun, _ in rows], [noun[1] for noun, _ in rows], [count for _, count in rows]]
        schema = NOUNS.with_metadata({_METADATA: json.dumps(facts).encode()})
        return pa.table(columns, schema=schema)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read back what `to_table` made.

        Raises:
            DataError: If the table is another one, or has lost its metadata.
        """
        if not table.schema.equals(NOUNS):
            raise DataError(f"noun counts: expected columns {', '.join(NOUNS.names)}, found {table.schema.names}")
        try:
            facts = json.loads((table.schema.metadata or {})[_METADATA])
            counts = cls(**facts)
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"noun counts: metadata missing or damaged ({error}); run `pixart stats` again") from error
        surfaces, tags, numbers = (table.column(name).to_pylist() for name in NOUNS.names)
        for surface, tag, number in zip(surfaces, tags, numbers, strict=True):
            counts.table[surface, tag] += number
        return counts


def count_nouns(captions: Iterable[str | None], tagger: Tagger) -> NounCounts:
    """Tag captions one at a time and count their nouns."""
    counts = NounCounts(tagger.name, tagger.approximate)
    for caption in captions:
        if caption is None or not caption.strip():
            counts.num_empty += 1
        else:
            counts.num_captions += 1
            counts.table.update(tagger.nouns(caption))
    return counts


@dataclass(frozen=True)
class NounStats:
    """One row of the paper's Table 1.

    Attributes:
        vn_dn: Valid over distinct nouns, 0 to 1. It grows with the number of captions.
        top_nouns: The most frequent distinct nouns with their counts, most frequent first.
    """

    num_captions: int
    num_empty: int
    distinct_nouns: int
    valid_nouns: int
    vn_dn: float
    total_nouns: int
    nouns_per_image: float
    approximate: bool
    tagger: str
    threshold: int = THRESHOLD
    top_nouns: tuple[tuple[str, int], ...] = ()


def summarise(counts: NounCounts) -> NounStats:
    """Derive the paper's figures from counts; ratios over nothing are 0."""
    distinct: Counter[str] = Counter()
    for (surface, _), count in counts.table.items():
        distinct[surface.lower()] += count
    total = distinct.total()
    num_valid = sum(count > THRESHOLD for count in distinct.values())
    top = sorted(distinct.items(), key=lambda item: (-item[1], item[0]))[:TOP_NOUNS]
    return NounStats(
        num_captions=counts.num_captions,
        num_empty=counts.num_empty,
        distinct_nouns=len(distinct),
        valid_nouns=num_valid,
        vn_dn=num_valid / max(len(distinct), 1),
        total_nouns=total,
        nouns_per_image=total / max(counts.num_captions, 1),
        approximate=counts.approximate,
        tagger=counts.tagger,
        top_nouns=tuple(top),
    )


@functools.cache
def _tag_function(kind: Kind) -> Callable[[str], Iterable[Noun]]:
    """Load a model once for each process."""
    if kind == "nltk":
        import nltk

        return lambda caption: nltk.pos_tag(nltk.word_tokenize(caption))
    from nltk.tokenize import NLTKWordTokenizer
    from textblob.en import parser

    tokenize = NLTKWordTokenizer().tokenize
    return lambda caption: itertools.chain.from_iterable(
        _first_tags(parser.find_tags(tokenize(sentence))) for sentence in _sentences(caption)
    )


def _first_tags(tagged: list[Any]) -> list[Noun]:
    """Some forty lexicon entries name several tags, as in `NN|JJ`."""
    return [(surface, tag.partition("|")[0]) for surface, tag in tagged]


def _sentences(caption: str) -> list[str]:
    """Split after . ? ! where a capital follows, abbreviations and initials excepted."""
    sentences, start = [], 0
    for gap in _SENTENCE_GAP.finditer(caption):
        before = caption[max(start, gap.start() - _ABBREVIATION_CHARS) : gap.start()]
        if not _NO_SENTENCE_END.search(before):
            sentences.append(caption[start : gap.end()])
            start = gap.end()
    return [*sentences, caption[start:]]


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _require_nltk_data(download: bool) -> None:
    missing, remarks = _missing()
    if missing and download:
        failure = _download()
        missing, remarks = _missing()
        remarks += [f"download failed: {failure}"] if failure else []
    if missing:
        why = f" ({'; '.join(dict.fromkeys(remarks))})" if remarks else ""
        raise ConfigError(
            f"noun tagger: expected NLTK's data files, found no {' and no '.join(missing)} "
            f"on {socket.gethostname()}{why}; {_REMEDY}"
        )


def _missing() -> tuple[list[str], list[str]]:
    """Name the packages that NLTK would not find now, with its remarks: it refuses folders that others may write."""
    import nltk.data

    missing, remarks = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, resource in _RESOURCES.items():
            try:
                nltk.data.find(resource)
            except LookupError:
                missing.append(name)
            except OSError as error:
                missing.append(name)
                remarks.append(str(error))
    return missing, remarks + [str(warning.message) for warning in caught]


def _download() -> str:
    """Have NLTK install its files; return why that failed, "" where it did not.

    NLTK waits 120 s for each address of a server that does not answer, so one quick connection is tried first,
    except through a proxy, which answers for the server.
    """
    import nltk
    from nltk.downloader import Downloader

    chatter = io.StringIO()
    index = urlsplit(Downloader.DEFAULT_URL)
    try:
        if "https" not in urllib.request.getproxies():
            socket.create_connection((index.hostname, index.port or 443), timeout=_CONNECT_TIMEOUT_S).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in _RESOURCES:
                if not nltk.download(name, quiet=True, prefix="", print_error_to=chatter):
                    return " ".join(chatter.getvalue().split()) or f"nltk.download({name!r}) returned False"
    except (OSError, ValueError, HTTPException, SyntaxError) as error:  # SyntaxError: the XML index does not parse
        return f"{index.hostname}: {error}"
    return ""
