"""How many tokens T5 makes of captions, by its real tokenizer, and what its limit cuts off.

Captions are cleaned and counted as `extract` does it, the end-of-sequence token included. Tokenizing takes some twenty
times as long as tagging, so that of a large corpus only a share of the rows is counted, drawn by `shares`: each unit of
work can be counted by itself, and its figures know at which level each row was drawn. Parts that were counted at
different levels, because the corpus grew in between, add up to what all of it gives at the highest of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data import shares
from pixart_data.errors import ConfigError, DataError
from pixart_data.models import loading
from pixart_data.texts import clean
from pixart_data.units import storable

SAMPLE_ROWS = 100_000
"""Of larger corpora so many rows are counted, or down to half as many."""

_CAPTIONS_AT_ONCE = 1000
_MOST_COUNTED = 1024  # tokens; the last bin of the histogram is "or more"
_HUB_TIMEOUT_S = 10.0
_CLEANING = "whitespace-1"

Ints = npt.NDArray[np.int64]


@dataclass(eq=False)
class _Tally:
    """What is known of the captions of one level."""

    counts: Ints
    num_tokens: int = 0
    num_lost: int = 0


@dataclass(eq=False)
class Lengths:
    """Captions by their number of tokens.

    `to_json` gives:

        {"tokenizer": "DeepFloyd/t5-v1_1-xxl", "identity": "sha256:...", "cleaning": "whitespace-1", "max_tokens": 120,
         "share_of_rows": 0.125, "num_captions": 4, "mean_tokens": 75.0, "num_truncated": 1, "share_truncated": 0.25,
         "num_tokens_lost": 17, "share_of_tokens_lost": 0.06, "counts": [0, 1, ...], "levels": {...}}

    `num_captions` were counted, drawn from `share_of_rows` of all rows. `counts[k]` of them have k tokens before they
    are cut, the last entry "or more"; `levels` is what `merge` needs. Means and shares of nothing are 0.

    Attributes:
        identity: Changes when the tokenizer does.
        level: One row in 2 ** level was counted.
    """

    tokenizer: str
    identity: str
    max_tokens: int
    cleaning: str = _CLEANING
    level: int = 0
    _tallies: dict[int, _Tally] = field(default_factory=dict)

    def add(self, num_tokens: Ints, levels: Ints) -> None:
        """Count captions by their tokens, (n,), drawn at these levels, (n,), none of which is below `level`."""
        for level in np.unique(levels).tolist():
            here = num_tokens[levels == level]
            tally = self._tally(level)
            tally.counts += np.bincount(np.minimum(here, self._last), minlength=self._last + 1)
            tally.num_tokens += int(here.sum())
            tally.num_lost += int(np.maximum(here - self.max_tokens, 0).sum())

    def emptied(self, level: int) -> "Lengths":
        """Return figures of no captions by the same tokenizer."""
        return Lengths(self.tokenizer, self.identity, self.max_tokens, self.cleaning, level)

    @property
    def _last(self) -> int:
        return max(_MOST_COUNTED, 2 * self.max_tokens)

    def _tally(self, level: int) -> _Tally:
        return self._tallies.setdefault(level, _Tally(np.zeros(self._last + 1, np.int64)))

    def merge(self, other: "Lengths") -> None:
        """Add the figures of other captions; the level becomes the higher of the two.

        Raises:
            DataError: If they were counted by another tokenizer, or with another limit.
        """
        mine, theirs = ((of.identity, of.cleaning, of.max_tokens) for of in (self, other))
        if mine != theirs:
            raise DataError(
                f"caption lengths: expected those of {self.tokenizer} ({self.identity}) up to {self.max_tokens} "
                f"tokens, found some of {other.tokenizer} ({other.identity}) up to {other.max_tokens}; count all "
                "captions with one tokenizer"
            )
        for level, tally in other._tallies.items():
            own = self._tally(level)
            own.counts += tally.counts
            own.num_tokens += tally.num_tokens
            own.num_lost += tally.num_lost
        self.level = max(self.level, other.level)
        self._tallies = {level: tally for level, tally in self._tallies.items() if level >= self.level}

    def to_json(self) -> dict[str, Any]:
        """Return the figures, as the class describes them."""
        counts = sum((tally.counts for tally in self._tallies.values()), np.zeros(self._last + 1, np.int64))
        num_captions, num_truncated = int(counts.sum()), int(counts[self.max_tokens + 1 :].sum())
        num_tokens = sum(tally.num_tokens for tally in self._tallies.values())
        num_lost = sum(tally.num_lost for tally in self._tallies.values())
        return {
            "tokenizer": self.tokenizer,
            "identity": self.identity,
            "cleaning": self.cleaning,
            "max_tokens": self.max_tokens,
            "share_of_rows": 2.0**-self.level,
            "num_captions": num_captions,
            "mean_tokens": num_tokens / max(num_captions, 1),
            "num_truncated": num_truncated,
            "share_truncated": num_truncated / max(num_captions, 1),
            "num_tokens_lost": num_lost,
            "share_of_tokens_lost": num_lost / max(num_tokens, 1),
            "counts": np.trim_zeros(counts, "b").tolist(),
            "levels": {
                "level": self.level,
                **{str(level): self._level_json(tally) for level, tally in sorted(self._tallies.items())},
            },
        }

    @staticmethod
    def _level_json(tally: _Tally) -> dict[str, Any]:
        used = np.flatnonzero(tally.counts).tolist()
        counts = {str(length): int(tally.counts[length]) for length in used}
        return {"counts": counts, "num_tokens": tally.num_tokens, "num_tokens_lost": tally.num_lost}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Lengths":
        """Return what `to_json` was called on.

        Raises:
            DataError: If it is something else.
        """
        try:
            levels = dict(facts["levels"])
            lengths = cls(
                facts["tokenizer"], facts["identity"], facts["max_tokens"], facts["cleaning"], levels.pop("level")
            )
            for level, found in levels.items():
                tally = lengths._tally(int(level))
                for length, count in found["counts"].items():
                    tally.counts[int(length)] = count
                tally.num_tokens, tally.num_lost = found["num_tokens"], found["num_tokens_lost"]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise DataError(f"caption lengths: expected what a count of them wrote, found {problem}") from error
        return lengths


class LengthCounter:
    """Counts the tokens of captions; a worker has one, and takes the figures of each unit from it.

    Example:
        >>> counter = LengthCounter("DeepFloyd/t5-v1_1-xxl", max_tokens=120, num_rows=25_000_000)
        >>> counter.add(pa.array(["a red house", None]), first_row=0, file="captions")
        >>> counter.take().to_json()["num_captions"]
        0

    Args:
        tokenizer: A folder or a hub id that `AutoTokenizer` loads.
        max_tokens: Longer captions are cut.
        num_rows: Of the whole corpus, as far as it is known when the job starts, see `begin`; 0 counts every row. It
            need not be in the digest of a unit: see `Lengths.merge`.
        sample_rows: So many of them are counted at most, on average.
        subfolder: Folder of the tokenizer inside its repository.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConfigError: If there is no such tokenizer, or the hub does not answer. A driver makes one, too, before it
            starts workers: this comes within seconds then, and once.
    """

    def __init__(
        self,
        tokenizer: str,
        max_tokens: int = 120,
        num_rows: int = 0,
        sample_rows: int = SAMPLE_ROWS,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> None:
        self._tokenizer = load_tokenizer(tokenizer, subfolder, revision)
        self._sample_rows = sample_rows
        self._lengths = Lengths(tokenizer, _identity(self._tokenizer), max_tokens)
        self.begin(num_rows)

    def begin(self, num_rows: int) -> None:
        """Start anew, with captions of a corpus of so many rows; a job of several sets calls this for each unit."""
        self._lengths = self._lengths.emptied(shares.level_of(num_rows, self._sample_rows))

    def add(
        self, captions: pa.Array | pa.ChunkedArray | Sequence[str | None], first_row: int = 0, file: str = ""
    ) -> None:
        """Count captions, those that are neither null nor blank.

        Args:
            captions: Neighbouring rows of a file: text of any Arrow type, or strings.
            first_row: Number of the first in the file, from 0.
            file: What the file is called, however it is cut into units: its name in the corpus, not that of the unit.
        """
        drawn = shares.levels(file, first_row, len(captions))
        places = np.flatnonzero(drawn >= self._lengths.level)
        for start in range(0, len(places), _CAPTIONS_AT_ONCE):
            some = places[start : start + _CAPTIONS_AT_ONCE]
            texts = [clean(text, _CLEANING) for text in _texts(captions, some)]
            counted = np.array([bool(text) for text in texts])
            if counted.any():
                ids = self._tokenizer([text for text in texts if text], verbose=False, return_attention_mask=False)
                self._lengths.add(np.array([len(row) for row in ids["input_ids"]]), drawn[some][counted])

    def take(self) -> Lengths:
        """Return what was counted since this was called last, and start anew."""
        taken = self._lengths
        self._lengths = taken.emptied(taken.level)
        return taken


def _texts(captions: pa.Array | pa.ChunkedArray | Sequence[str | None], places: npt.NDArray[np.intp]) -> list[str]:
    """Return texts at some places, empty ones for nulls."""
    if isinstance(captions, pa.Array | pa.ChunkedArray):
        values = captions.cast(pa.large_binary()).take(pa.array(places)).to_pylist()  # of views, none can be taken
        return ["" if value is None else value.decode("utf-8", "replace") for value in values]
    return [storable(captions[place] or "") for place in places.tolist()]


def load_tokenizer(model: str, subfolder: str | None = None, revision: str | None = None) -> Any:
    """Load a tokenizer from its folder, from the hub's cache on this machine, or from the hub.

    Raises:
        ConfigError: If there is none, or the hub does not answer: that is tried once, since the libraries would try
            for minutes.
    """
    from transformers import AutoTokenizer

    # `None` is not a subfolder to transformers, the empty string is none.
    options: dict[str, Any] = {"subfolder": subfolder or "", "revision": revision}
    with loading("tokenizer", model):
        if model.startswith("/"):
            return AutoTokenizer.from_pretrained(model, **options)
        try:
            return AutoTokenizer.from_pretrained(model, local_files_only=True, **options)
        except (OSError, ValueError, ImportError):  # not there, or a part of it is
            _require_hub(model, revision)
            return AutoTokenizer.from_pretrained(model, **options)


def _require_hub(model: str, revision: str | None) -> None:
    """Ask the hub for a model.

    Raises:
        ConfigError: If it does not know it, refuses it, or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(model, revision=revision, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise ConfigError(
            f"tokenizer: the hub lends {model} only to those who accept its terms; accept them on its page, then "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"tokenizer: expected a folder or a hub id, found {model}{at}, which is no folder here and unknown to the "
            "hub; check its spelling, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # noqa: BLE001  what the hub's client raises has no common root
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"tokenizer: {model} is not in the cache of this machine, and the hub does not answer ({why:.200}); give a "
            "folder with its tokenizer, e.g. from `hf download` on a machine that reaches the hub, or leave tokenizer "
            "out: lengths are then not measured"
        ) from error


def _identity(tokenizer: Any) -> str:
    """Return a digest of all that decides a tokenizer's ids, the same wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
    else:
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.all_special_tokens]
        content = json.dumps(parts)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
