"""The device and the type of the arithmetic that a job asks for."""

import torch

from pixart_data.errors import ConfigError
from pixart_data.sections import Device
from pixart_model.config import Precision


def resolve_device(device: Device) -> torch.device:
    """Return the device; `auto` is a GPU if there is one.

    Raises:
        ConfigError: If a GPU is asked for and torch sees none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device: expected a GPU that torch can use, found none; set device = 'auto' or 'cpu'")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def resolve_dtype(dtype: Precision, device: torch.device) -> torch.dtype:
    """Return the type; `auto` is bf16 on a GPU and fp32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.bfloat16 if dtype == "bf16" else torch.float32
