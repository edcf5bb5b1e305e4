"""The text codecs: bytes, speed and error, on synthetic features of T5-XXL's width.

    python -m benchmarks.measure_codecs [--captions N] [--device cuda] [--json FILE]

No T5 is asked: the features have what makes T5's hard to quantize. Channel scales are log-normal; 8 channels are 20 to
60 times, 40 channels 4 to 10 times larger; channel means are not zero, entries heavy-tailed, tokens of unlike gain. In
the second round four more channels are 20 times larger again. Codecs are calibrated on other captions than those
measured. `int8 per token`, one scale for each token and nothing else, is there to show what the channel scales are for.

GB/s counts bf16 bytes, per CPU-second of one thread; on a GPU per second. Captions are encoded one by one, as `extract`
does, and decoded in batches of 64, as training does; bf16 needs no decoding, and is copied for comparison. The median
of the rounds is shown.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart_data.codecs import CODECS, Codec, calibrate
from pixart_data.fidelity import Measure

_WIDTH, _MAX_TOKENS = 4096, 120
_BATCH = 64
_NUM_CALIBRATION = 120  # captions, about 10,000 tokens
_ROUNDS = 5


def make_captions(count: int, num_massive: int) -> list[Tensor]:
    """Return features bf16 (n, 4096) of captions with n ~ N(85, 25) cut to 10..120."""
    rng = np.random.default_rng(0)
    scales = rng.lognormal(-2, 0.7, _WIDTH)
    large = rng.permutation(_WIDTH)
    scales[large[:8]] *= rng.uniform(20, 60, 8)
    scales[large[8:48]] *= rng.uniform(4, 10, 40)
    scales[large[48 : 48 + num_massive]] *= 20 * rng.uniform(20, 60, num_massive)
    means = 0.3 * rng.standard_normal(_WIDTH)
    captions = []
    for num_tokens in np.clip(rng.normal(85, 25, count).round(), 10, _MAX_TOKENS).astype(int):
        entries = rng.standard_normal((num_tokens, _WIDTH)) * np.exp(0.3 * rng.standard_normal((num_tokens, _WIDTH)))
        gains = rng.lognormal(0, 0.2, (num_tokens, 1))
        captions.append(torch.from_numpy((entries + means) * scales * gains).bfloat16())
    return captions


def measure_codec(codec: Codec, captions: Sequence[Tensor]) -> dict[str, Any]:
    """Encode and decode captions and return bytes for each token, GB/s and errors."""
    device = captions[0].device
    encoded = [codec.encode(caption) for caption in captions]
    batch = [
        torch.from_numpy(np.concatenate(arrays).view(np.int16 if arrays[0].dtype == np.uint16 else arrays[0].dtype))
        for arrays in zip(*encoded[:_BATCH], strict=True)
    ]
    parts = [
        (part.view(torch.bfloat16) if dtype == "BF16" else part).to(device)
        for part, (_, dtype) in zip(batch, codec.tensors, strict=True)
    ]
    firsts = np.cumsum([0, *map(len, captions[:_BATCH])])[:-1]
    starts = torch.from_numpy(np.repeat(firsts, [len(arrays[-1]) for arrays in encoded[:_BATCH]])).to(device)
    measure = Measure()
    for caption, arrays in zip(captions, encoded, strict=True):
        measure.add(caption, codec.decode_arrays(arrays).to(device))
    num_tokens = sum(map(len, captions))
    return {
        "bytes_per_token": sum(array.nbytes for arrays in encoded for array in arrays) / num_tokens,
        "encode_gb_s": speed(lambda: [codec.encode(caption) for caption in captions], captions),
        "decode_gb_s": speed(lambda: decode(codec, parts, starts), captions[:_BATCH]),
        **measure.facts(),
    }


def decode(codec: Codec, parts: list[Tensor], starts: Tensor) -> Tensor:
    """Decode a batch into memory of its own."""
    decoded = codec.decode(parts, starts)
    return decoded.clone() if decoded is parts[0] else decoded


def speed(work: Callable[[], object], captions: Sequence[Tensor]) -> float:
    """Return GB of bf16 for each second: of the CPU, or on a GPU of the clock."""
    on_gpu = captions[0].is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    size_bytes = 2 * sum(caption.numel() for caption in captions)
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = clock()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return size_bytes / statistics.median(seconds[1:]) / 1e9


def measure_per_token(captions: Sequence[Tensor]) -> dict[str, Any]:
    """Return the bytes and errors of int8 with one scale for each token."""
    measure = Measure()
    for caption in captions:
        x = caption.float()
        scale = (x.abs().amax(dim=1, keepdim=True) / 127).bfloat16().float()
        measure.add(caption, ((x / scale).round().clamp(-127, 127) * scale).bfloat16())
    return {"bytes_per_token": _WIDTH + 2, **measure.facts()}


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Return the results as text, a line for each codec."""
    names = ("bytes/token", "encode GB/s", "decode GB/s", "relative", "channels", "worst", "lowest cosine")
    lines = [title, f"{'':16}" + "".join(f"{name:>14}" for name in names)]
    for name, row in rows.items():
        keys = ("relative_error", "channel_error", "worst_channel_error", "cosine_lowest")
        speeds = [f"{row[key]:14.2f}" if key in row else " " * 14 for key in ("encode_gb_s", "decode_gb_s")]
        errors = "".join(f"{row[key]:14.5f}" for key in keys)
        lines.append(f"{name:16}{row['bytes_per_token']:14.1f}{''.join(speeds)}{errors}")
    return "\n".join(lines)


def main() -> int:
    """Measure every codec on both kinds of features."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--captions", type=int, default=192, help="captions to measure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for num_massive in (0, 4):
        captions = make_captions(_NUM_CALIBRATION + options.captions, num_massive)
        captions = [caption.to(options.device) for caption in captions]
        calibration, measured = captions[:_NUM_CALIBRATION], captions[_NUM_CALIBRATION:]
        rows = {name: measure_codec(calibrate(name, calibration), measured) for name in CODECS}
        rows["int8 per token"] = measure_per_token(measured)
        title = f"{len(measured)} captions, {num_massive} massive channels"
        sys.stdout.write(f"\n{table(title, rows)}\n")
        figures[title] = rows
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
