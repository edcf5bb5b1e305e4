"""The two transformers under one name: what a job's `[model]` section describes."""

from pixart_model.dit import DiT
from pixart_model.model import PixArt
from pixart_model.sizes import Model

Network = PixArt | DiT


def build(config: Model, grad_checkpointing: bool = False) -> Network:
    """Return the transformer that a section describes, freshly initialised on the current device."""
    return DiT(config, grad_checkpointing) if config.condition == "class" else PixArt(config, grad_checkpointing)
