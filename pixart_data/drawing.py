"""Answers drawn with random numbers of each row's own, so that what shares a batch with a row decides nothing of it."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TopPLogitsWarper

from pixart_data.questions import Decoding


class Drawing(LogitsProcessor):  # type: ignore[misc]  # the library has no types
    """Makes greedy decoding draw: the most likely token of noisy scores is a draw from their distribution.

    The noise is Gumbel's (Maddison, Tarlow and Minka, "A* Sampling", 2014), of a generator for each row on the CPU:
    `generate` itself draws a whole batch from one generator, so that an answer would depend on its neighbours and on
    the device. To be used for one call of `generate`, with `do_sample=False`.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        self.decoding = decoding
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._warp = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self._num_before: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (B, V) whose largest is the token to take, from scores and the ids so far, (B, T)."""
        if self._num_before is None:
            self._num_before = input_ids.shape[1]  # the prompt, or what starts a decoder
        scores = scores.float()
        answer = input_ids[:, self._num_before :]  # (B, A)
        if self.decoding.frequency_penalty and answer.shape[1]:
            ones = torch.ones(answer.shape, dtype=scores.dtype, device=scores.device)
            counts = torch.zeros_like(scores).scatter_add_(1, answer, ones)  # (B, V)
            scores = scores - self.decoding.frequency_penalty * counts
        if self.decoding.temperature == 0:
            return scores
        scores = scores / self.decoding.temperature
        if self._warp is not None:
            scores = self._warp(input_ids, scores)
        shares = torch.stack([torch.rand(scores.shape[1], generator=one) for one in self._generators])  # (B, V)
        return scores - torch.log(-torch.log(shares.to(scores.device)))
