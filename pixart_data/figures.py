"""What stored features look like in numbers, and what in them cannot be right.

Latents are judged as training sees them: shifted and scaled, they should have a mean near zero and a standard deviation
near one. The limits are wide enough for what published VAEs do: single channels of Stable Diffusion XL's lie at 0.7 and
at -0.3 to 0.3, all channels together at 0.9.

Legend: C latent channels, D text width, P positions in a caption.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

POOLED_LIMITS = (0.75, 1.33)
"""Of the standard deviation of all channels together, scaled."""
CHANNEL_LIMITS = (0.5, 2.0)
"""Of the standard deviation of a channel, scaled."""
MOST_MEAN = 1.0
"""Of the mean of a channel, scaled, without its sign."""
OUTLIER_RATIO = 6.0
"""A text channel is an outlier whose rms is this many times the median channel's."""
MOST_CODEC_ERROR = 0.03


@dataclass(frozen=True)
class LatentFigures:
    """Of a sample of posteriors, unscaled, by channel; arrays are (C,).

    Attributes:
        num_samples: Looked at; those with non-finite values are in no other figure.
        mean, std: Of latents drawn from the posteriors, computed and not drawn.
        least, most: Of the posteriors' means.
        posterior_std: Mean of the stored standard deviations.
        num_nonfinite, num_zero, num_negative: Samples with NaN or infinite values, with nothing but zeros in the mean,
            and with a standard deviation below zero.
    """

    num_samples: int
    mean: Floats
    std: Floats
    least: Floats
    most: Floats
    posterior_std: Floats
    num_nonfinite: int
    num_zero: int
    num_negative: int
    scaling_factor: float
    shift_factor: float

    @property
    def num_used(self) -> int:
        """Samples that the figures are of."""
        return self.num_samples - self.num_nonfinite

    def scaled(self, values: Floats) -> Floats:
        """Return values as training sees them."""
        return (values - self.shift_factor) * self.scaling_factor

    @property
    def scaled_std(self) -> Floats:
        """Standard deviations as training sees them, (C,)."""
        return self.std * self.scaling_factor

    @property
    def pooled_std(self) -> float:
        """Standard deviation of all channels together, unscaled."""
        variance = float(np.mean(self.std**2 + self.mean**2) - np.mean(self.mean) ** 2)
        return math.sqrt(max(variance, 0.0))

    @property
    def is_noise(self) -> bool:
        """Whether posteriors are wider than their means are spread."""
        return bool(np.any(self.posterior_std > self.std / math.sqrt(2)))

    def alarms(self) -> Iterator[str]:
        """Yield what cannot be right: what was found, what it may mean and what to do."""
        of = f"of {self.num_samples:,} latents looked at"
        if self.num_nonfinite:
            yield (
                f"{self.num_nonfinite:,} {of} hold NaN or infinite values: training would become NaN; the VAE "
                'overflowed, most likely: extract again with image.dtype = "fp32"'
            )
        if self.num_zero:
            yield (
                f"{self.num_zero:,} {of} are zero throughout: they hold no picture; a conversion that failed, or "
                "files that were cut off: run `pixart verify`, then make these features anew"
            )
        if self.num_negative:
            yield (
                f"{self.num_negative:,} {of} have a posterior std below zero: it looks like a log-variance; where "
                "these features come from, store exp(log-variance / 2) in its place"
            )
        if self.num_used > self.num_zero:
            yield from self._scale()

    def _scale(self) -> Iterator[str]:
        low, high = POOLED_LIMITS
        pooled = self.pooled_std * self.scaling_factor
        if not low <= pooled <= high:
            yield (
                f"times the scaling factor {self.scaling_factor:g}, all channels together have a std of {pooled:.3g}, "
                f"expected about 1 ({low} to {high}): {self._reason()}"
            )
        wrong = [
            f"channel {number} has mean {mean:.2f} and std {std:.2f}"
            for number, (mean, std) in enumerate(zip(self.scaled(self.mean), self.scaled_std, strict=True))
            if abs(mean) > MOST_MEAN or not CHANNEL_LIMITS[0] <= std <= CHANNEL_LIMITS[1]
        ]
        if wrong and low <= pooled <= high:
            yield (
                f"scaled for training, {', '.join(wrong)}; expected a mean within {MOST_MEAN:g} of zero and a std from "
                f"{CHANNEL_LIMITS[0]} to {CHANNEL_LIMITS[1]:g}: images that are much alike, or another VAE's factors: "
                "compare scaling_factor and shift_factor in manifest.json with the VAE's config.json"
            )
        if self.is_noise and not self.num_negative:
            yield (
                "the posterior std is larger than the means are spread: a latent is more noise than picture; a VAE "
                "whose weights are random or of another architecture, or a variance stored where std belongs: "
                "look at the decoded pictures (--html FILE)"
            )

    def _reason(self) -> str:
        low, high = POOLED_LIMITS
        if low <= self.pooled_std <= high and not self.is_noise:
            return (
                "without the factor it is about 1, so what is stored was multiplied by it already, and training would "
                "do so twice; divide by it where these features come from, then import or extract them again"
            )
        return (
            "another VAE's factor, images that were not brought to -1..1, pictures all alike, or random weights; "
            "compare image.model and scaling_factor in manifest.json with the VAE's config.json, and extract again"
        )


@dataclass
class LatentSums:
    """Adds up posteriors for `LatentFigures`."""

    num_channels: int
    num_samples: int = 0
    _bad: dict[str, int] = field(default_factory=lambda: {"nonfinite": 0, "zero": 0, "negative": 0})
    _num_cells: int = 0
    _sums: Floats = field(init=False)  # of mean, mean squared, std, std squared
    _least: Floats = field(init=False)
    _most: Floats = field(init=False)

    def __post_init__(self) -> None:
        self._sums = np.zeros((4, self.num_channels))
        self._least = np.full(self.num_channels, np.inf)
        self._most = np.full(self.num_channels, -np.inf)

    def add(self, moments: npt.NDArray[np.float16]) -> None:
        """Add a posterior, (2, C, h, w)."""
        self.num_samples += 1
        values = moments.reshape(2, self.num_channels, -1).astype(np.float64)
        if not np.isfinite(values).all():
            self._bad["nonfinite"] += 1
            return
        mean, std = values
        self._bad["zero"] += not mean.any()
        self._bad["negative"] += bool((std < 0).any())
        self._num_cells += mean.shape[1]
        self._sums += [part.sum(axis=1) for part in (mean, mean**2, std, std**2)]
        self._least = np.minimum(self._least, mean.min(axis=1))
        self._most = np.maximum(self._most, mean.max(axis=1))

    def figures(self, scaling_factor: float, shift_factor: float) -> LatentFigures:
        """Return the figures of all that was added."""
        mean, square, std, std_square = self._sums / max(self._num_cells, 1)
        empty = np.zeros(self.num_channels)
        return LatentFigures(
            num_samples=self.num_samples,
            mean=mean,
            std=np.sqrt(np.maximum(square - mean**2 + std_square, 0.0)),
            least=self._least if self._num_cells else empty,
            most=self._most if self._num_cells else empty,
            posterior_std=std,
            num_nonfinite=self._bad["nonfinite"],
            num_zero=self._bad["zero"],
            num_negative=self._bad["negative"],
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )


@dataclass(frozen=True)
class TextFigures:
    """Of a sample of captions, decoded.

    Attributes:
        num_samples: Captions looked at; those with non-finite values are in no other figure.
        token_rms: Of each token over its channels, (tokens,), in ascending order.
        position_rms: Mean of the tokens' rms at each position of a caption, (P,).
        channel_rms: Of each channel over all tokens, (D,).
        num_zero: Tokens that are zero vectors.
    """

    num_samples: int
    token_rms: Floats
    position_rms: Floats
    channel_rms: Floats
    num_zero: int
    num_nonfinite: int

    @property
    def zero_share(self) -> float:
        """Share of tokens that are zero vectors."""
        return self.num_zero / max(len(self.token_rms), 1)

    def outliers(self) -> list[tuple[int, float]]:
        """Return the channels that are far larger than the rest, and how many times the median one, largest first."""
        median = float(np.median(self.channel_rms)) if len(self.channel_rms) else 0.0
        if not median:
            return []
        ratios = self.channel_rms / median
        return [(int(i), float(ratios[i])) for i in np.argsort(-ratios, kind="stable") if ratios[i] > OUTLIER_RATIO]

    def alarms(self) -> Iterator[str]:
        """Yield what cannot be right: what was found, what it may mean and what to do."""
        if self.num_nonfinite:
            yield (
                f"{self.num_nonfinite:,} of {self.num_samples:,} captions looked at hold NaN or infinite values: "
                'training would become NaN; T5 overflows in fp16: extract again with text.dtype = "bf16"'
            )
        if self.num_zero:
            yield (
                f"{self.zero_share:.2%} of the tokens looked at are zero vectors: padding was stored as if it were "
                "text, most likely; import again with attention masks, or extract again"
            )


class TextSums:
    """Adds up captions for `TextFigures`."""

    def __init__(self, width: int) -> None:
        self.num_samples = self.num_nonfinite = 0
        self._squares = np.zeros(width)
        self._rms: list[Floats] = []

    def add(self, features: npt.NDArray[np.float32]) -> None:
        """Add a caption, (n, D)."""
        self.num_samples += 1
        if not np.isfinite(features).all():
            self.num_nonfinite += 1
            return
        squares = np.square(features, dtype=np.float64)
        self._squares += squares.sum(axis=0)
        self._rms.append(np.sqrt(squares.mean(axis=1)))

    def figures(self) -> TextFigures:
        """Return the figures of all that was added."""
        rms = np.concatenate([np.empty(0), *self._rms])
        longest = max(map(len, self._rms), default=0)
        positions = np.concatenate([np.arange(len(one)) for one in self._rms] or [np.empty(0, np.int64)])
        counts = np.bincount(positions, minlength=longest)
        return TextFigures(
            num_samples=self.num_samples,
            token_rms=np.sort(rms),
            position_rms=np.bincount(positions, rms, longest) / np.maximum(counts, 1),
            channel_rms=np.sqrt(self._squares / max(len(rms), 1)),
            num_zero=int(np.count_nonzero(rms == 0)),
            num_nonfinite=self.num_nonfinite,
        )
