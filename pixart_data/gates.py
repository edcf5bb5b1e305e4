"""The gate: which captions are good enough, and what is wrong with the others."""

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.sections import Gate

if TYPE_CHECKING:
    from pixart_data.quality import Inspector
    from pixart_data.tagging.blocks import Engine
    from pixart_data.tagging.engines import Kind

FAILURES = (
    "empty",
    "refusal",
    "echo",
    "truncated",
    "loop",
    "rambling",
    "boilerplate",
    "too_short",
    "too_few_nouns",
)
"""What can be wrong with a caption, in the order in which failures are listed."""

_FLAGS = ("refusal", "echo", "truncated")  # a measure and a setting are named so, too
_BOILERPLATE_SENTENCES = 3  # one or two may both begin so
_OTHERWISE = "or set gate.approximate = true to judge captions by TextBlob's lexicon"


def failures(measures: pa.RecordBatch, gate: Gate) -> pa.Array:
    """Return for each caption what is wrong with it: a list of `FAILURES`, empty for one that passes.

    Args:
        measures: Rows of `quality.MEASURES`. A null or blank caption is "empty" and nothing else.
        gate: The limits.

    Returns:
        An array of lists of strings, (N,), without nulls.
    """
    empty = measures["num_tokens"].is_null().to_numpy(zero_copy_only=False)
    failed = {"empty": empty}
    for name, mask in _rules(measures, gate).items():
        failed[name] = mask.fill_null(False).to_numpy(zero_copy_only=False)
    no_rows = np.zeros(len(empty), np.bool_)
    table = np.column_stack([failed.get(name, no_rows) for name in FAILURES])
    offsets = np.append(0, np.cumsum(table.sum(1))).astype(np.int32)
    names = pa.array(np.array(FAILURES, object)[np.nonzero(table)[1]], pa.string())
    return pa.ListArray.from_arrays(offsets, names)


def _rules(measures: pa.RecordBatch, gate: Gate) -> dict[str, pa.Array]:
    """Return what fails by name; null, where there is nothing to measure, does not fail."""
    num_tokens, num_sentences = measures["num_tokens"], measures["num_sentences"]
    varied = _exceeds(measures["distinct_2"], gate.max_distinct_pairs)
    empty_openers = pc.divide(measures["num_boilerplate"].cast(pa.float64()), num_sentences.cast(pa.float64()))
    several = pc.greater_equal(num_sentences, _BOILERPLATE_SENTENCES)
    return {
        **{name: measures[name] for name in _FLAGS if getattr(gate, name)},
        "loop": _exceeds(measures["repeated_share"], gate.max_repeated),
        "rambling": pc.and_(varied, pc.greater_equal(num_tokens, gate.rambling_tokens)),
        "boilerplate": pc.and_(pc.greater(empty_openers, gate.max_boilerplate), several),
        "too_short": pc.less(num_tokens, gate.min_tokens),
        "too_few_nouns": pc.less(measures["num_distinct_nouns"], gate.min_nouns),
    }


def _exceeds(shares: pa.Array, limit: float) -> pa.Array:
    """Compare in the precision of the shares: as such 0.3 is 0.3, and otherwise a little more."""
    return pc.greater(shares, pa.scalar(limit, shares.type))


def find_tagger(kind: "Kind") -> str:
    """Return the name of the engine that tags the words of captions to be judged, without loading it.

    Raises:
        ConfigError: If it needs data that this machine does not have.
    """
    from pixart_data.tagging.references import TextBlobEngine, nltk_name
    from pixart_data.tagging.resources import find_resources

    if kind == "textblob":
        return TextBlobEngine().name
    find_resources(otherwise=_OTHERWISE)
    return nltk_name()


class CaptionGate:
    """Judges texts, for the caption job; threads may share it, one judges at a time.

    The engine is opened at the first call, since every rule needs at least the tokens.

    Args:
        gate: The limits.
        kind: The engine: "textblob" needs no data, and what fails with it differs by few captions.
    """

    def __init__(self, gate: Gate, kind: "Kind") -> None:
        self.gate, self.kind = gate, kind
        self._lock = threading.Lock()

    @functools.cached_property
    def _opened(self) -> "tuple[Engine, Inspector]":
        from pixart_data.quality import Inspector
        from pixart_data.tagging.engines import open_engine

        find_tagger(self.kind)  # says what to do without its data in the words of this command
        engine = open_engine(self.kind)
        return engine, Inspector(engine.vocabulary, with_openers=False)

    @property
    def tagger(self) -> str:
        """The name of the engine, which is opened for it."""
        return self._opened[0].name

    def judge(
        self, captions: Sequence[str | None], prompts: Sequence[str | None], finish_reasons: Sequence[str | None]
    ) -> list[list[str]]:
        """Return what is wrong with each caption, [] for one that passes.

        Args:
            captions: None and blank ones are "empty".
            prompts: As sent; None where it is not known.
            finish_reasons: "length" where the caption was cut off; None where it is not known.

        Raises:
            ConfigError: If the engine needs data that this machine does not have.
            DataError: If that data is damaged.
        """
        with self._lock:
            engine, inspector = self._opened
            texts, asked = _texts(captions), _texts(prompts)
            measures = inspector.measure(engine.tag(texts), asked, pa.array(finish_reasons, pa.string()))
        found: list[list[str]] = failures(measures, self.gate).to_pylist()
        return found


def _texts(texts: Sequence[str | None]) -> pa.Array:
    """Return texts as Arrow holds them: without lone surrogates."""
    encoded = [None if text is None else text.encode("utf-16-le", "surrogatepass") for text in texts]
    decoded = [None if data is None else data.decode("utf-16-le", "replace") for data in encoded]
    return pa.array(decoded, pa.large_string())
