"""Synthetic features: the content that every layout of `benchmarks.read_shards` holds.

As PixArt-alpha's at 256 px: moments of the one square bucket, fp16 (2, 4, 32, 32), and T5-XXL's tokens, bf16 (n, 4096)
with n ~ N(85, 25) cut to 10..120. The channels of the tokens are as unlike as T5's: log-normal scales, 40 channels 4 to
10 times and 8 channels 20 to 60 times larger. Captions are windows of one long run of random tokens, each starting
elsewhere: no two samples are alike, and yet thousands take no time to make.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHANNELS, SIDE, WIDTH, MAX_TOKENS = 4, 32, 4096, 120
REFERENCE_RAW_BYTES = 4 * (MAX_TOKENS * WIDTH + 2 * CHANNELS * SIDE * SIDE)
"""Of a sample in fp32, padded, not compressed; the reference's mask not counted."""

_MIN_TOKENS = 10
_MIN_RUN = 8192  # tokens
_WORDS = (
    "a",
    "the",
    "of",
    "with",
    "under",
    "red",
    "blue",
    "old",
    "small",
    "cat",
    "harbour",
    "street",
    "glass",
    "light",
)


@dataclass(frozen=True)
class Samples:
    """The samples, in the order in which they are written.

    Attributes:
        moments: fp16 (N, 2, C, H, W).
        starts: Where in `run` the caption of each sample starts.
        num_tokens: True tokens of each caption.
        run: Bits of bf16, uint16 (T, D).
    """

    moments: npt.NDArray[np.float16]
    starts: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    run: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.starts)

    def key(self, i: int) -> str:
        """Return the key of a sample."""
        return f"synthetic/{i:06d}"

    def number(self, key: str) -> int:
        """Return the place of a sample with this key."""
        return int(key.rpartition("/")[2])

    def caption(self, i: int) -> str:
        """Return a caption of about as many words as tokens would need."""
        return " ".join(random.Random(i).choices(_WORDS, k=int(self.num_tokens[i]) * 3 // 4))

    def text(self, i: int) -> npt.NDArray[np.uint16]:
        """Return the true tokens of a sample, bits of bf16 (n, D)."""
        return self.run[self.starts[i] : self.starts[i] + self.num_tokens[i]]

    def padded(self, i: int) -> npt.NDArray[np.uint16]:
        """Return a sample's text as an encoder gives it, (120, D): what follows the true tokens is not zero."""
        return self.run[self.starts[i] : self.starts[i] + MAX_TOKENS]

    def first(self, count: int) -> "Samples":
        """Return the first `count` samples."""
        return Samples(self.moments[:count], self.starts[:count], self.num_tokens[:count], self.run)

    def save(self, root: Path) -> None:
        """Write the samples to a new folder, for `load`."""
        root.mkdir()
        for name, values in vars(self).items():
            np.save(root / f"{name}.npy", values)


def make(count: int) -> Samples:
    """Make samples; the same ones each time."""
    rng = np.random.default_rng(0)
    length = max(_MIN_RUN, 2 * count)
    scales = rng.lognormal(-2, 0.7, WIDTH)
    large = rng.permutation(WIDTH)[:48]
    scales[large] *= np.concatenate([rng.uniform(20, 60, 8), rng.uniform(4, 10, 40)])
    run = np.empty((length, WIDTH), np.uint16)
    for i in range(0, length, 1024):
        values = rng.standard_normal((min(1024, length - i), WIDTH), np.float32) * scales.astype(np.float32)
        run[i : i + 1024] = values.view(np.uint32) >> 16  # bf16 by truncation: as good as rounding for random values
    num_tokens = np.clip(rng.normal(85, 25, count).round(), _MIN_TOKENS, MAX_TOKENS).astype(np.int64)
    starts = rng.permutation(length - MAX_TOKENS)[:count]
    moments = rng.standard_normal((count, 2, CHANNELS, SIDE, SIDE), np.float32).astype(np.float16)
    np.abs(moments[:, 1], out=moments[:, 1])  # a standard deviation
    return Samples(moments, starts, num_tokens, run)


def load(root: Path) -> Samples:
    """Return samples that were saved, mapped into memory: many processes compare with them."""
    names = ("moments", "starts", "num_tokens", "run")
    return Samples(*(np.load(root / f"{name}.npy", mmap_mode="r") for name in names))
