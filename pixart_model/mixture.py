"""The text of a sample, drawn from several text sets: the captions that a captioner wrote, short ones, raw ones.

Which set a sample's text comes from is a pure function of (seed, epoch, key), where the epoch is that of the sample in
its bucket's stream: it does not depend on the batch, the step, or the other samples, so a run that continues draws what
it would have drawn. A sample that lacks the text of a set draws from the others, with their weights scaled up.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from pixart_data.calibrations import read_codec, split
from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import FeatureSet
from pixart_model.draws import Words, draws, stream, uniform
from pixart_model.orders import Integers

_TEXT = 16  # what these numbers are drawn for; smaller ones are the order's


class Mixture:
    """Text sets and their weights.

    Attributes:
        sets: In the order of their names, which the draws depend on; the job file's order does not matter.
        names: Of the sets.
        weights: Of the sets, not normalised.
        codecs: Of the sets.

    Args:
        sets: None, for images with classes in place of texts.

    Raises:
        ConfigError: If the sets were made by different encoders.
        DataError: If what a set's codec needs is missing or damaged.
    """

    def __init__(self, sets: Mapping[str, FeatureSet], weights: Mapping[str, float]) -> None:
        self.names = sorted(sets)
        self.sets = [sets[name] for name in self.names]
        self.weights = np.array([weights[name] for name in self.names])
        for other in self.sets:
            if encoder(other) != encoder(self.main):
                raise ConfigError(
                    f"data.text_mix: expected sets of one encoder, found {encoder(self.main)} in {self.main.root} and "
                    f"{encoder(other)} in {other.root}; extract them with the same [text]"
                )
        self.codecs = [read_codec(one.root, one.manifest) for one in self.sets]

    @property
    def main(self) -> FeatureSet:
        """The set with the largest weight, the first of several such.

        Raises:
            ConfigError: If there are no texts.
        """
        self.require_texts()
        return self.sets[int(np.argmax(self.weights))]

    def require_texts(self) -> None:
        """Check that there are texts; raises ConfigError."""
        if not self.sets:
            raise ConfigError(
                "data.text_set: expected captions, found features that were opened with classes in their place; set "
                "model.condition = 'caption'"
            )

    def draw(self, has: npt.NDArray[np.bool_], seed: int, epochs: Integers, hashes: Words) -> Integers:
        """Return the number of the set that each sample's text comes from.

        Args:
            has: Whether a set has a text of a sample, (sets, B); one of them has.
            seed: Of the run.
            epochs: (B,), of each sample.
            hashes: (B,), of the keys.
        """
        bounds = np.cumsum(self.weights[:, None] * has, axis=0)  # (sets, B)
        drawn = uniform(draws(draws(stream(seed, _TEXT), epochs), hashes)) * bounds[-1]
        first: Integers = (drawn >= bounds).sum(axis=0)  # the first set whose bound is above the draw
        return first

    def null_caption(self) -> Tensor:
        """Return the features of the empty caption, of the main set; bf16 (n, D).

        Raises:
            DataError: If it has none, or they are damaged.
        """
        texts, codec = self.main, self.codecs[self.sets.index(self.main)]
        place = texts.manifest.model.get("null")
        if not place:
            raise DataError(
                f"{texts.root}: no features of the empty caption; extract the text set again, or, of imported "
                "features, import it with text.null_caption"
            )
        data = np.empty(place["size_bytes"], np.uint8)
        texts.read_into(place["path"], place["offset_bytes"], data.data)
        if crc32(data.data) != place["crc32"]:
            raise DataError(
                f"{texts.root / place['path']}: the empty caption is damaged: its checksum differs from the manifest; "
                f"`pixart verify {texts.root}` names all that is"
            )
        try:
            return codec.decode_arrays(split(codec, data, place["num_tokens"]))
        except ValueError as error:
            raise DataError(f"{texts.root}: the empty caption is damaged: {error}; copy manifest.json again") from error

    def close(self) -> None:
        """Close the shards."""
        for one in self.sets:
            one.close()


def encoder(features: FeatureSet) -> str:
    """Return what made a set, in words."""
    model = features.manifest.model
    width = f", {model['width']} wide" if "width" in model else ""
    return f"{model.get('identity') or (model.get('id'), model.get('revision'))}{width}"
