"""What stands for no caption: in training where a caption is dropped, and in sampling without guidance's condition.

There is one convention: the text encoder's features of the empty string, at their own length, as the dataset stores
them; diffusers' pipeline has the same one. Models of the PixArt-alpha repository were trained with another, a fixed
table that is cut at the length of the caption that it replaces; they can go on with it.

Legend: B captions, n_i tokens of caption i, N of all, n rows of the null caption, D width of the text encoder.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixart_data.errors import ConfigError
from pixart_model.packing import Packed, offsets_of


@dataclass(frozen=True, eq=False)
class NullCaption:
    """The null caption and how long it is.

    Attributes:
        features: bf16 (n, D): of the empty string, or the reference's `y_embedding`, 120 rows.
        follows_caption: Whether it is cut at the length of the caption that it replaces, as the reference does.
    """

    features: Tensor
    follows_caption: bool = False

    def to(self, device: torch.device | str) -> "NullCaption":
        """Return a copy on a device, or this one if it is there."""
        return dataclasses.replace(self, features=self.features.to(device))

    def at(self, length: int) -> Tensor:
        """Return what replaces a caption of `length` tokens, (m, D), a view: m is n, or `length` of the reference's.

        Raises:
            ConfigError: If the caption is longer than the reference's table.
        """
        if not self.follows_caption:
            return self.features
        if length > len(self.features):
            raise ConfigError(
                f"null_caption: expected captions of at most {len(self.features)} tokens, which the reference's table "
                f"covers, found one of {length}; use text features with max_tokens = {len(self.features)}, or "
                'init.null_caption = "empty"'
            )
        return self.features[:length]

    def replace(self, text: Packed, drop: Sequence[bool]) -> Packed:
        """Return the captions with those replaced that `drop` says, on the captions' device and in their type.

        Nothing waits for the device: the new lengths follow from what the host knows.

        Args:
            text: B captions.
            drop: Of each, whether it is dropped.

        Raises:
            ConfigError: As `at` does.
        """
        if not any(drop):
            return text
        null = dataclasses.replace(self, features=self.features.to(text.tokens))
        parts = [
            null.at(len(caption)) if dropped else caption for caption, dropped in zip(text.split(), drop, strict=True)
        ]
        lengths = tuple(len(part) for part in parts)
        return Packed(torch.cat(parts), offsets_of(lengths, text.tokens.device), lengths)


def is_repeated(table: Tensor) -> bool:
    """Tell a `y_embedding` whose rows are all one token, as we write the empty string's, from the reference's own.

    Attention to copies of a token is attention to the token, so it is the empty string at any length.
    """
    return bool((table == table[:1]).all())
