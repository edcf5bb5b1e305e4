"""The device and the type of the arithmetic that a job asks for."""

import functools
import logging
from collections.abc import Callable

import torch

from pixart_data.errors import ConfigError
from pixart_data.sections import Device
from pixart_model.config import Precision

_BF16_CAPABILITY = (8, 0)
_log = logging.getLogger(__name__)


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
    """Return the type; `auto` is bf16 on a GPU that computes in it, fp32 on an older one, of which it tells, or a CPU.

    Raises:
        ConfigError: If bf16 is asked for and the GPU does not compute in it: it would be slower than fp32.
    """
    if dtype == "fp32" or (dtype == "auto" and device.type == "cpu"):
        return torch.float32
    older = _older(device)
    if older is None:
        return torch.bfloat16
    if dtype == "bf16":
        raise ConfigError(
            f"dtype: expected a GPU that computes in bf16, of capability 8.0 (A100) or more, found {older}; set dtype "
            "= 'auto' or 'fp32'"
        )
    _tell(older)
    return torch.float32


def follow(device: torch.device) -> Callable[[], None]:
    """Return what another thread has to call first, for its work with CUDA to go to the GPU that is this thread's.

    Threads begin with the first GPU of the machine, where they would take memory that other processes need.
    """
    if device.type != "cuda":
        return _stay
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def _stay() -> None:
    pass


def _older(device: torch.device) -> str | None:
    """Return the name of a GPU from before bf16; of any other device, None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


@functools.cache  # a run asks for its type in several places
def _tell(older: str) -> None:
    _log.info("%s: does not compute in bf16; with dtype = 'auto' this is fp32", older)
