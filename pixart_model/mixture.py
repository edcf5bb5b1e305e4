"""The text of a sample, drawn from several text sets: the captions that a captioner wrote, short ones, raw ones.

Which set a sample's text comes from is a pure function of (seed, epoch, key): it does not depend on the batch, the
step, or the other samples, so a run that continues draws what it would have drawn. A sample that lacks the text of a
set draws from the others, with their weights scaled up.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.errors import ConfigError
from pixart_data.shards import FeatureSet, tensor_shape
from pixart_model.places import Places, Rows, columns

_DRAW_BYTES = 6  # exact in a float, and never rounded up to 1


class Mixture:
    """Text sets and their weights.

    Attributes:
        sets: In the order of their names, which the draws depend on; the job file's order does not matter.
        weights: Of the sets, not normalised.
        main: The set with the largest weight, the first of several such.

    Raises:
        ConfigError: If the sets were made by different encoders.
    """

    def __init__(self, sets: Mapping[str, FeatureSet], weights: Mapping[str, float]) -> None:
        names = sorted(sets)
        self.sets = [sets[name] for name in names]
        self.weights = np.array([weights[name] for name in names])
        self.main = self.sets[int(np.argmax(self.weights))]
        for other in self.sets:
            if _encoder(other) != _encoder(self.main):
                raise ConfigError(
                    f"data.text_mix: expected sets of one encoder, found {_encoder(self.main)} in {self.main.root} and "
                    f"{_encoder(other)} in {other.root}; extract them with the same [text]"
                )
        self._places = [Places(one, one.index) for one in self.sets]
        self._num_tokens = [columns(one.index, ("num_tokens",))["num_tokens"] for one in self.sets]
        self._rows = np.empty((len(self.sets), 0), np.int64)

    def match(self, keys: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Name samples from now on by their place among the keys that have a text; return which keys have one."""
        found = [pc.fill_null(pc.index_in(keys, value_set=one.index["key"]), -1).to_numpy() for one in self.sets]
        rows = np.stack(found).astype(np.int64)  # (sets, keys), -1 where there is no text
        matched: npt.NDArray[np.bool_] = rows.max(axis=0) >= 0
        self._rows = rows[:, matched]
        return matched

    def shares(self) -> dict[str, tuple[float, int]]:
        """Return the weight of each set, normalised, and how many of the matched samples it holds."""
        counts = (self._rows >= 0).sum(axis=1)
        shares = self.weights / self.weights.sum()
        return {
            one.root.name: (float(share), int(count))
            for one, share, count in zip(self.sets, shares, counts, strict=True)
        }

    def num_unmatched(self) -> int:
        """Return how many keys of the sets are of no matched sample."""
        num_keys = len(self.main)
        if len(self.sets) > 1:
            chunks = [chunk for one in self.sets for chunk in one.index["key"].chunks]
            num_keys = len(pc.unique(pa.chunked_array(chunks, type=self.main.index["key"].type)))
        return int(num_keys - self._rows.shape[1])

    def draw(self, samples: Sequence[int] | Rows, keys: Sequence[str], seed: int, epoch: int) -> Rows:
        """Return the number of the set that each sample's text comes from."""
        has = self._rows[:, np.asarray(samples, np.int64)] >= 0  # (sets, B)
        bounds = np.cumsum(self.weights[:, None] * has, axis=0)  # (sets, B)
        draws = np.array([_uniform(seed, epoch, key) for key in keys]) * bounds[-1]
        drawn: Rows = (draws >= bounds).sum(axis=0)  # the first set whose bound is above the draw
        return drawn

    def read(
        self, samples: Sequence[int] | Rows, keys: Sequence[str], seed: int, epoch: int
    ) -> tuple[npt.NDArray[np.int16], Rows]:
        """Return the texts of samples.

        Returns:
            The bits of bf16 features (B, L, D), zeros after each text's end, and lengths (B,).

        Raises:
            DataError: Naming the sample that is damaged or missing.
        """
        drawn = self.draw(samples, keys, seed, epoch)
        rows = self._rows[drawn, np.asarray(samples, np.int64)]  # (B,), in the index of the set drawn
        lengths = np.array([self._num_tokens[one][row] for one, row in zip(drawn, rows, strict=True)], np.int64)
        width = tensor_shape({"num_tokens": 1}, self.main.manifest)[1]
        text = np.zeros((len(keys), int(lengths.max()), width), np.int16)
        for out, one, row, key, length in zip(text, drawn, rows, keys, lengths, strict=True):
            self._places[one].read(int(row), key, out[:length])
        return text, lengths

    def close(self) -> None:
        """Close the shards."""
        for one in self.sets:
            one.close()


def _encoder(features: FeatureSet) -> str:
    model = features.manifest.model
    return f"{model.get('identity') or (model.get('id'), model.get('revision'))}, {model.get('width')} wide"


def _uniform(seed: int, epoch: int, key: str) -> float:
    """Return a number from 0 to below 1 that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=_DRAW_BYTES).digest()
    return int.from_bytes(digest) / 256.0**_DRAW_BYTES
