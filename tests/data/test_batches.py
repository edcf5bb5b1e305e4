"""Memory that runs out, for real: under a limit of the operating system, in a process of its own."""

import subprocess
import sys

import pytest

from pixart_data import events
from pixart_data.batches import Halving

CODE = """
import resource, sys
import numpy as np
import torch
from pixart_data import events
from pixart_data.encoders import ImageEncoder
from pixart_data.sections import ImageFeatures

torch.set_num_threads(1)
encoder = ImageEncoder(ImageFeatures(model=sys.argv[1]))
pixels = np.random.default_rng(0).integers(0, 255, (32, 256, 256, 3), dtype=np.uint8)
one_by_one = np.concatenate([encoder({"pixels": pixels[i : i + 1]})["moments"] for i in range(32)])
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), -1))
together = encoder({"pixels": pixels})["moments"]
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert together.shape == one_by_one.shape
print(np.abs(together.astype(np.float32) - one_by_one).max(), encoder._moments.limit, events.counts())
"""


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_that_is_remembered(miniatures):
    command = [sys.executable, "-c", CODE, miniatures["vae"], str(192 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    difference, limit, *_ = done.stdout.split()
    assert float(difference) < 1e-3
    assert 1 <= int(limit) <= 16
    assert "'batch_halved': " in done.stdout


def test_one_row_that_does_not_fit_is_an_error(miniatures):
    command = [sys.executable, "-c", CODE, miniatures["vae"], str(1 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "emory" in done.stderr


def fits(limit):
    calls = []

    def function(rows):
        calls.append(len(rows))
        if len(rows) > limit:
            raise MemoryError
        return [row * 2 for row in rows]

    return function, calls


def test_the_limit_is_kept_and_the_order_too():
    function, calls = fits(3)
    halving = Halving(function)
    before = events.counts().get("batch_halved", 0)
    assert halving(list(range(16))) == [row * 2 for row in range(16)]
    assert halving.limit in (2, 3, 4)
    assert events.counts()["batch_halved"] > before
    calls.clear()
    assert halving(list(range(16))) == [row * 2 for row in range(16)]
    assert max(calls) <= 3
    assert halving([]) == []


def test_padded_text_is_weighed_by_its_tokens():
    def function(rows):
        if len(rows) * len(rows[-1]) > 40:
            raise MemoryError
        return [len(row) for row in rows]

    halving = Halving(function, weigh=lambda rows: len(rows) * len(rows[-1]))
    assert halving(["x" * 10] * 8) == [10] * 8
    assert halving.limit == 40
    assert halving(["x"] * 40) == [1] * 40  # short ones still go together


def test_other_errors_are_not_taken_for_it():
    def function(rows):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        Halving(function)([1, 2, 3])


def test_a_gpu_without_memory_is_known_by_its_error():
    import torch

    from pixart_data.batches import is_out_of_memory

    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
