"""One of several processes: which one this is under `torchrun`, and which of them speaks.

`torchrun` starts the same command once for each GPU. What is worth saying is said by the first; the others are heard
when something is wrong with them, and marked with their rank.
"""

import hashlib
import os
from datetime import timedelta

_WAIT_S = 5.0


def rank() -> int:
    """Return the number of this process among those of `torchrun`; 0 without it."""
    return int(os.environ["RANK"]) if is_one_of_several() else 0


def is_first() -> bool:
    """Tell whether this process speaks for all: without `torchrun` it always does."""
    return rank() == 0


def is_ours_to_say(text: str) -> bool:
    """Tell whether this process has to say that it failed: all may fail alike, and once is enough.

    The first process leaves word with `torchrun` and speaks. The others wait a few seconds for its word of the same
    failure, and speak where none comes, or nobody can be asked.
    """
    if not is_one_of_several() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    key, patience = f"pixart/{hashlib.sha256(text.encode()).hexdigest()}", timedelta(seconds=_WAIT_S)
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
        if is_first():
            store.set(key, "said")
            return True
        store.wait([key], patience)
    except RuntimeError:  # nobody answers, or no word came
        return True
    return False


def is_one_of_several() -> bool:
    """Tell whether `torchrun` has started this process and others with it."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
