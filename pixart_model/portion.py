"""One dataset of those that are trained on: an image set and its texts, joined, and reading batches of them.

A batch is located first: the records of its samples, gathered at once and checked, say where each tensor lies and how
long it is. Then its tensors are read, each straight to its place in the batch. Nothing is done for a token, and for a
sample little more than the read itself and its checksum.

Legend: B samples, b of them with a text of the same set; D text width.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pixart_data.buckets import Bucket
from pixart_data.entries import ENTRIES, Entries, checks
from pixart_data.errors import DataError
from pixart_data.shards import DTYPES, BatchBuffer, FeatureSet, MemberPlaces
from pixart_model.batches import Captions, HostBatch, Names
from pixart_model.buffers import Buffers, bytes_of
from pixart_model.draws import Words, draws, stream, uniform
from pixart_model.labels import Labels
from pixart_model.mixture import Mixture
from pixart_model.orders import Integers, Order, Picks
from pixart_model.roster import NONE, Joined

Wrong = dict[int, DataError]
"""What is wrong with samples, by their place in the batch."""

_FLIP = 17  # what these numbers are drawn for; smaller ones are the order's and the mixture's
_TYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "U16": torch.int16, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Texts:
    """The captions of a batch that are of one text set.

    Attributes:
        set: Its number.
        samples: Which of the batch they belong to; (b,).
        entries: Their records; (b,).
        num_rare: Of what the codec stores apart, the rows of each; (b,).
    """

    set: int
    samples: Integers
    entries: Entries
    num_rare: Integers


@dataclass(frozen=True, eq=False)
class Located:
    """A batch and where its tensors lie; of no use if something is wrong already.

    Attributes:
        images: The records of the samples; (B,).
        places: Of the moments, mirrored or not.
    """

    picks: Picks
    images: Entries
    places: MemberPlaces
    texts: Sequence[Texts]
    wrong: Wrong


class Portion:
    """Matched samples of an image set and one or more text sets. Calls may come from any thread.

    Args:
        images: The image set.
        mixture: The text sets.
        joined: Their plan.
        order: Of the samples.
        choice: A digest of the rows that a query chose.
        flip: Share of samples that are read mirrored.
        damaged: What to do about samples that are.

    Attributes:
        labels: The classes of the images, if they have classes in place of texts.
    """

    def __init__(
        self,
        images: FeatureSet,
        mixture: Mixture,
        joined: Joined,
        order: Order,
        choice: str = "",
        flip: float = 0.0,
        damaged: Literal["fail", "skip"] = "fail",
    ) -> None:
        self.images, self.mixture, self.joined, self.order = images, mixture, joined, order
        self.choice, self.flip, self.damaged = choice, flip, damaged
        self.labels: Labels | None = None
        manifest = images.manifest
        self.buckets = [Bucket(one["ratio"], one["height_px"], one["width_px"]) for one in manifest.buckets]
        cell_px, channels = manifest.model["downsampling"], manifest.model["channels"]
        self._shapes = [(2, channels, one.height_px // cell_px, one.width_px // cell_px) for one in self.buckets]
        self._told: dict[str, object] = {}

    def locate(self, number: int) -> Located:
        """Return where everything of a batch of the order lies."""
        return self.locate_picks(self.order.batch(number))

    def locate_picks(self, picks: Picks) -> Located:
        """Return where everything of some samples lies, which are of one bucket."""
        samples = picks.samples.astype(np.int64)
        images, wrong = self._image_records(samples)
        size_bytes = np.dtype(np.float16).itemsize * int(np.prod(self._shapes[picks.bucket]))
        for i in np.flatnonzero((images["bucket"] != picks.bucket) | (images["size"] != size_bytes)):
            wrong.setdefault(int(i), _misfit(self.images, "an image of another bucket than the plan has"))
        texts, wrong_texts = self._locate_texts(samples, picks.epochs, images["key"])
        wrong |= {i: error for i, error in wrong_texts.items() if i not in wrong}
        return Located(picks, images, self._image_places(images, picks.epochs), texts, wrong)

    def expect(self, located: Located) -> None:
        """Have the system fetch what will be read."""
        if not located.wrong:
            self.images.expect(located.places, located.images["size"].tolist())
            for texts in located.texts:
                self.mixture.sets[texts.set].expect(_places(texts.entries), texts.entries["size"].tolist())

    def read(self, step: int, located: Located, buffers: Buffers | None = None) -> HostBatch:
        """Read a batch, checking every tensor against its checksum.

        Args:
            step: Its number in the global order.
            located: From `locate`.
            buffers: To read into; memory of its own where None.

        Raises:
            DataError: Naming a sample that is damaged or missing, if that is the policy or none of the batch is whole.
            JobError: If the storage fails.
        """
        skipped: dict[int, str] = {}
        while True:
            memory = buffers or Buffers()
            wrong = located.wrong or self._read_images(located, memory)
            captions: list[Captions] = []
            for texts in located.texts if not wrong else ():
                one, wrong_texts = self._read_texts(texts, memory)
                captions.append(one)
                wrong |= wrong_texts
            if not wrong:
                return self._batch(step, located, captions, memory, tuple(skipped.values()), buffers)
            picks = located.picks
            whole = [i for i in range(len(picks.samples)) if i not in wrong]
            for i, error in sorted(wrong.items()):
                skipped.setdefault(i, self._damaged(located, i, error, bool(whole)))
            instead = [i if i not in wrong else min(whole, key=lambda j: (j < i, j)) for i in range(len(picks.samples))]
            located = self.locate_picks(Picks(picks.bucket, picks.samples[instead], picks.epochs[instead]))

    def captions(self, samples: Integers) -> list[Tensor]:
        """Return captions of samples, bf16 (n_i, D) each.

        Raises:
            ConfigError: If there are no texts.
            DataError: If one is damaged, or has no whole record.
        """
        self.mixture.require_texts()
        images, wrong = self._image_records(samples)
        found, wrong_texts = self._locate_texts(samples, np.zeros(len(samples), np.int64), images["key"])
        for error in (wrong | wrong_texts).values():
            raise error
        captions: dict[int, Tensor] = {}
        for texts in found:
            stored, wrong = self._read_texts(texts, Buffers())
            for error in wrong.values():
                raise error
            split = torch.split(stored.decode().clone(), stored.lengths.tolist())
            captions |= zip(texts.samples.tolist(), split, strict=True)
        return [captions[i] for i in range(len(samples))]

    def close(self) -> None:
        """Close the shards."""
        self.images.close()
        self.mixture.close()

    def shares(self) -> dict[str, tuple[float, int]]:
        """Return the weight of each text set, normalised, and how many of the samples it holds."""
        shares = self.mixture.weights / self.mixture.weights.sum()
        counts = self.joined.counts.texts
        return {name: (float(share), n) for name, share, n in zip(self.mixture.names, shares, counts, strict=True)}

    def facts(self) -> dict[str, Any]:
        """Return where the features come from: encoders, policies, digests and counts; for JSON.

        There is no `text` where there are none.
        """
        sets = {"image": self.images} | ({"text": self.mixture.main} if self.mixture.sets else {})
        facts: dict[str, Any] = {
            kind: {"model": s.manifest.model, "policy": s.manifest.policy, "index_sha256": s.manifest.index_sha256}
            for kind, s in sets.items()
        }
        if len(self.mixture.sets) > 1:
            facts["text_mix"] = {name: {"share": share, "samples": n} for name, (share, n) in self.shares().items()}
        counts = asdict(self.joined.counts)
        return facts | {"counts": {name: list(n) if isinstance(n, tuple) else n for name, n in counts.items()}}

    # Where things lie

    def _image_records(self, samples: Integers) -> tuple[Entries, Wrong]:
        return _gather(self.images, self.joined.images[samples])

    def _image_places(self, images: Entries, epochs: Integers) -> MemberPlaces:
        if not self.flip:
            return _places(images)
        drawn = uniform(draws(draws(stream(self.order.seed, _FLIP), epochs), images["key"]))
        mirrored = (drawn < self.flip) & (images["flipped_offset"] > 0)
        offsets = np.where(mirrored, images["flipped_offset"], images["offset"])
        checksums = np.where(mirrored, images["flipped_crc"], images["crc"])
        return MemberPlaces(images["shard"].tolist(), offsets.tolist(), checksums.tolist())

    def _locate_texts(self, samples: Integers, epochs: Integers, hashes: Words) -> tuple[list[Texts], Wrong]:
        if not self.joined.texts:
            return [], {}
        numbers = np.stack([column[samples] for column in self.joined.texts])  # (sets, B)
        drawn = np.zeros(len(samples), np.int64)
        if len(numbers) > 1:
            drawn = self.mixture.draw(numbers != NONE, self.order.seed, epochs, hashes)
        found: list[Texts] = []
        wrong: Wrong = {}
        for one in np.unique(drawn).tolist():
            features = self.mixture.sets[one]
            own = np.flatnonzero(drawn == one)
            entries, damaged = _gather(features, numbers[one, own])
            num_rare, misfits = self._num_rare(one, entries)
            misfits |= entries["key"] != hashes[own]
            problem = _misfit(features, "a text of another key or length than the plan has")
            wrong |= {int(own[i]): problem for i in np.flatnonzero(misfits)}
            wrong |= {int(own[i]): error for i, error in damaged.items()}
            found.append(Texts(one, own, entries, num_rare))
        return found, wrong

    def _num_rare(self, one: int, entries: Entries) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """Return how many values each caption stores apart, and whether its size fits its number of tokens."""
        codec = self.mixture.codecs[one]
        per_token, per_rare = sum(_part_bytes(codec.tensors, codec.shapes(1, 0))), 0
        if codec.size_bytes(1) is None:
            per_rare = sum(_part_bytes(codec.tensors, codec.shapes(0, 1)))
        rest = entries["size"].astype(np.int64) - per_token * entries["num_tokens"].astype(np.int64)
        num_rare = rest // max(per_rare, 1)
        misfits = (rest < 0) | (num_rare * per_rare != rest) | (entries["num_tokens"] == 0)
        return num_rare * bool(per_rare), misfits

    # Reading

    def _read_images(self, located: Located, memory: Buffers) -> Wrong:
        moments = self._moments(located, memory)
        size_bytes = moments[0].nbytes
        bounds = range(0, size_bytes * (len(moments) + 1), size_bytes)
        return self.images.read_batch(located.places, [BatchBuffer(bytes_of(moments), bounds)])

    def _moments(self, located: Located, memory: Buffers) -> Tensor:
        return memory.take("moments", torch.float16, (len(located.images), *self._shapes[located.picks.bucket]))

    def _read_texts(self, texts: Texts, memory: Buffers) -> tuple[Captions, Wrong]:
        codec, name = self.mixture.codecs[texts.set], self.mixture.names[texts.set]
        lengths = texts.entries["num_tokens"].astype(np.int64)
        per_token = _part_bytes(codec.tensors, codec.shapes(1, 0))
        per_rare = _part_bytes(codec.tensors, codec.shapes(0, 1))
        shapes = codec.shapes(int(lengths.sum()), int(texts.num_rare.sum()))
        parts, buffers = [], []
        for (part, dtype), shape, token_bytes, rare_bytes in zip(
            codec.tensors, shapes, per_token, per_rare, strict=True
        ):
            parts.append(memory.take(f"{name} {part}", _TYPES[dtype], shape))
            ends = np.cumsum(token_bytes * lengths + rare_bytes * texts.num_rare)
            buffers.append(BatchBuffer(bytes_of(parts[-1]), [0, *ends.tolist()]))
        found = self.mixture.sets[texts.set].read_batch(_places(texts.entries), buffers)
        put = partial(_put, memory)
        captions = Captions(
            codec,
            put(f"{name} samples", texts.samples),
            put(f"{name} lengths", lengths),
            put(f"{name} rare", texts.num_rare),
            parts,
        )
        return captions, {int(texts.samples[i]): error for i, error in found.items()}

    def _batch(
        self,
        step: int,
        located: Located,
        captions: Sequence[Captions],
        memory: Buffers,
        skipped: tuple[str, ...],
        lent: Buffers | None,
    ) -> HostBatch:
        images, count = located.images, len(located.images)
        lengths = np.zeros(count, np.int64)
        labels = None
        if self.labels is not None:
            labels = _put(memory, "labels", self.labels.of_rows[images["row"]].astype(np.int64))
        for texts in located.texts:
            lengths[texts.samples] = texts.entries["num_tokens"]
        sizes_px = np.stack([images["height"], images["width"]], axis=1).astype(np.float32)
        ratios = np.full(count, float(self.buckets[located.picks.bucket].ratio), np.float32)
        return HostBatch(
            Names(self.images, images["row"]),
            step,
            self._moments(located, memory),
            captions,
            _put(memory, "lengths", lengths),
            _put(memory, "sizes", sizes_px),
            _put(memory, "ratios", ratios),
            skipped,
            labels,
            lent,
            memory.turn,
        )

    def _damaged(self, located: Located, i: int, error: DataError, others: bool) -> str:
        """Return what to call a damaged sample, told of in the log; raises if it is not to be replaced."""
        name = f"record {self.joined.images[int(located.picks.samples[i])]} of {self.images.root / ENTRIES}"
        if i not in located.wrong:  # else its row is not to be trusted
            name = _key(self.images, located.images[i])
        if self.damaged == "fail":
            raise DataError(f"sample {name}: {error}, or set data.damaged = 'skip'") from error
        if not others:
            raise DataError(
                f"sample {name}: {error}; so is every other sample of the batch: none can take its place; copy the "
                "shard again, or make it again and start a new run.output"
            ) from error
        token = object()
        if self._told.setdefault(name, token) is token:
            _log.warning("skipped: sample %s: %s", name, error)
        return name


def _gather(features: FeatureSet, numbers: npt.NDArray[np.uint32]) -> tuple[Entries, Wrong]:
    """Return records of a set, and which of them are damaged."""
    entries = np.asarray(features.entries)[numbers]
    wrong: Wrong = {}
    whole = (entries["check"] == checks(entries)) & (entries["shard"] < len(features.shards))
    for i in np.flatnonzero(~whole).tolist():
        wrong[i] = DataError(
            f"{features.root / ENTRIES}: damaged: record {numbers[i]} does not fit its check; `pixart extract`, run "
            "again, writes this file anew"
        )
    return entries, wrong


def _places(entries: Entries) -> MemberPlaces:
    return MemberPlaces(entries["shard"].tolist(), entries["offset"].tolist(), entries["crc"].tolist())


def _part_bytes(tensors: Sequence[tuple[str, str]], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    sizes = [np.dtype(DTYPES[dtype]).itemsize for _, dtype in tensors]
    return [size * int(np.prod(shape)) for size, shape in zip(sizes, shapes, strict=True)]


def _put(memory: Buffers, name: str, values: npt.NDArray[np.generic]) -> Tensor:
    tensor = memory.take(name, torch.from_numpy(values[:0]).dtype, values.shape)
    tensor.numpy()[...] = values
    return tensor


def _misfit(features: FeatureSet, what: str) -> DataError:
    return DataError(
        f"{features.root / ENTRIES}: found {what}: the file is damaged or was exchanged; `pixart extract`, run again, "
        "writes it anew"
    )


def _key(images: FeatureSet, entry: np.void) -> str:
    try:
        return Names(images, np.array([entry["row"]])).keys()[0]
    except (OSError, pa.ArrowException, IndexError):
        return f"in row {entry['row']}"
