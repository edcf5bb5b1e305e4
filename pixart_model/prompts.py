"""Prompts that were encoded once for a run: `prompts-DIGEST.safetensors` in its directory.

Training has no text encoder; whoever starts a run encodes the prompts of its grid before (`pixart train` does). A run
that goes on finds them there, and encodes anew only what has changed. The digest is of the words and the encoder: who
starts a run with others, while one goes on, takes nothing from it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart_data.shards import Manifest
from pixart_data.storage import write_atomic

LIST = "prompts.txt"
_KEY = "made_from"
_DIGITS = 12  # of a digest, enough to tell a run's prompts apart


def prompts_path(run_dir: Path, prompts: Sequence[str], texts: Manifest) -> Path:
    """Return where the encoded prompts of a run are, or belong; `texts` is the manifest of its text set."""
    digest = hashlib.sha256(_made_from(prompts, texts).encode()).hexdigest()[:_DIGITS]
    return run_dir / f"prompts-{digest}.safetensors"


def write_prompts(run_dir: Path, prompts: Sequence[str], texts: Manifest, features: Sequence[Tensor]) -> None:
    """Leave encoded prompts for a run.

    Args:
        run_dir: The run's directory.
        prompts: B of them.
        texts: The manifest of the text set that the run trains on, whose encoder it was.
        features: bf16 (n_i, D) of each, true tokens only.

    Raises:
        JobError: If the storage fails.
    """
    tensors = {_name(i): feature.contiguous() for i, feature in enumerate(features)}
    content = safetensors.torch.save(tensors, {_KEY: _made_from(prompts, texts)})
    write_atomic(prompts_path(run_dir, prompts, texts), content)


def read_prompts(run_dir: Path, prompts: Sequence[str], texts: Manifest) -> list[Tensor] | None:
    """Return encoded prompts, (n_i, D) each; None where none can be read, or those of other words or encoders."""
    path = prompts_path(run_dir, prompts, texts)
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(_KEY) != _made_from(prompts, texts):
                return None
            return [file.get_tensor(_name(i)) for i in range(len(prompts))]
    except (SafetensorError, OSError):
        return None


def write_legend(folder: Path, columns: int, legend: Sequence[str]) -> None:
    """Say in `prompts.txt` beside sheets of pictures what is on them, by row and column; raises JobError."""
    places = (f"row {i // columns + 1}, column {i % columns + 1}" for i in range(len(legend)))
    text = "".join(f"{place}: {_in_a_line(words)}\n" for place, words in zip(places, legend, strict=True))
    write_atomic(folder / LIST, text.encode())


def _name(i: int) -> str:
    return f"prompt_{i:04d}"


def _made_from(prompts: Sequence[str], texts: Manifest) -> str:
    """All that decides the features."""
    model: dict[str, Any] = {key: value for key, value in texts.model.items() if key != "null"}
    return json.dumps({"prompts": list(prompts), "model": model, "policy": texts.policy}, sort_keys=True)


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
