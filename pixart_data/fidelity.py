"""How far decoded text features are from the original ones, measured batch by batch and joined over units.

Legend: N tokens of a batch, D text width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


class Measure:
    """Adds up how far decoded features are from the original ones."""

    def __init__(self) -> None:
        self._num_tokens = 0
        # fp64, over tokens: squares (2, D) of the errors and of the originals, sum of the cosines, lowest cosine.
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, original: "Tensor", decoded: "Tensor") -> None:
        """Compare the tokens of a batch: both (N, D), finite, on one device, which is not waited for."""
        import torch

        if not len(original):
            return
        x, y = original.double(), decoded.double()
        of_x, of_y = x.square(), y.square()
        squares = torch.stack([(y - x).square_().sum(dim=0), of_x.sum(dim=0)])
        long_x, long_y = of_x.sum(dim=1).sqrt_(), of_y.sum(dim=1).sqrt_()  # (N,)
        alike = (long_x == long_y).double()  # what zeros are to zeros, and to others
        cosines = torch.where(long_x * long_y > 0, (x * y).sum(dim=1) / (long_x * long_y), alike)
        total, lowest = cosines.sum(), cosines.min()
        if self._sums is not None:
            before = [sums.to(x.device) for sums in self._sums]
            squares, total, lowest = squares + before[0], total + before[1], torch.minimum(lowest, before[2])
        self._num_tokens += len(x)
        self._sums = squares, total, lowest

    def facts(self) -> dict[str, Any]:
        """Return the figures; they go into JSON and can be merged.

        Returns:
            `num_tokens`. `relative_error`: |decoded - original| / |original| over all values, which the largest
            channels decide. `cosine_mean`, `cosine_lowest`: of the angle between them, over tokens. `channel_error`:
            the relative error after dividing each channel by its rms, what a model sees that rescales channels;
            `worst_channel_error`: of the worst channel.
        """
        if self._sums is None:
            return merge([])
        squares, total, lowest = self._sums
        norms: npt.NDArray[np.float64] = squares.sqrt().cpu().numpy()
        return _facts(self._num_tokens, total.item() / self._num_tokens, lowest.item(), norms)


def merge(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the facts of several measures, such as those of a set's units; see `Measure.facts`.

    Errors are root mean squares weighted by tokens, which are those of the whole as far as units are alike; of the
    worst and the lowest, the worst and the lowest. Sums of each channel would be exact, at 40 kB for each unit.
    """
    some = [facts for facts in measured if facts["num_tokens"]]
    if not some:
        return _facts(0, 1.0, 1.0, np.zeros((2, 0)))
    counts = np.array([facts["num_tokens"] for facts in some], np.float64)

    def mean(name: str, power: int) -> float:
        values = np.array([facts[name] for facts in some], np.float64)
        return float((counts @ values**power / counts.sum()) ** (1 / power))

    return {
        "num_tokens": int(counts.sum()),
        "relative_error": mean("relative_error", 2),
        "cosine_mean": mean("cosine_mean", 1),
        "cosine_lowest": min(facts["cosine_lowest"] for facts in some),
        "channel_error": mean("channel_error", 2),
        "worst_channel_error": max(facts["worst_channel_error"] for facts in some),
    }


def _facts(num_tokens: int, mean: float, lowest: float, norms: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the figures; `norms` (2, D) are of the errors and of the originals of each channel."""
    error, original = norms
    live = original > 0  # a channel that is zero throughout stays zero, and has no rms to divide by
    ratios = np.square(error[live] / original[live])
    size = float(np.linalg.norm(original))
    return {
        "num_tokens": num_tokens,
        "relative_error": float(np.linalg.norm(error)) / size if size else 0.0,
        "cosine_mean": mean,
        "cosine_lowest": lowest,
        "channel_error": math.sqrt(ratios.mean()) if len(ratios) else 0.0,
        "worst_channel_error": math.sqrt(ratios.max(initial=0.0)),
    }
