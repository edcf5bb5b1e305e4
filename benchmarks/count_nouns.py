"""Counting nouns, against NLTK itself: the same counts, and how much sooner.

    python -m benchmarks.count_nouns [--rounds K] [--zipf-captions N] [--json FILE]

The captions are those in `../shared/captions` where they are present, dense ones and alt-texts, else made-up ones of
both kinds. NLTK is `pos_tag(word_tokenize(caption))` in a loop, with a Counter of its nouns; ours is the engine that
`pixart stats` opens and its counter. The counts of both are compared, then they take turns in one process, which is
measured by its CPU time:

    nltk    all captions once
    cold    ours, with an engine that has just been opened: it has met the captions of its proof, and no others. That
            it was compiled before is not in the time, but shown
    warm    ours, with the captions that the engine has met: passes for half a second at least

A ratio is the median of the ratios inside each round; the exit code is 1 if a limit is missed.

Then, in processes of their own: the time of the first start on a machine, which compiles, and of a later one, with the
memory that each stage takes; two processes at once against one; captions read from Parquet, with and without counting,
drawn from the same few, so that the rate is a warm one; and the peak memory of counting a stream of captions whose
words are spread by Zipf's law, a million captions a unit, and of merging the units as `pixart stats` does it. Its limit
is one for 10 million captions, and is judged at that number alone.

NLTK's data files must be where NLTK finds them: set NLTK_DATA, if they are not in `../shared/nltk_data`.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import counting
from benchmarks.corpora import ALT_TEXT, DENSE, SHARED, load
from benchmarks.read_shards import machine
from pixart_data.errors import PixArtError
from pixart_data.tagging.proof import CAPTIONS as PROOF

LIMITS = {(DENSE, "warm"): 250, (DENSE, "cold"): 20, (ALT_TEXT, "warm"): 100, (ALT_TEXT, "cold"): 10}
"""At least so many times as fast as NLTK."""

ZIPF_LIMIT_BYTES, ZIPF_LIMIT_CAPTIONS = 2_000_000_000, 10_000_000
"""Counting so many captions takes less memory than that; of fewer captions it would say nothing."""

ZIPF_CAPTIONS = 2_000_000

_WARM_S = 0.5
_ROOT = Path(__file__).parent.parent

Rates = dict[str, list[float]]
"""Captions per CPU-second of each round, by way."""


def measure(captions: pa.Array, rounds: int) -> tuple[Rates, int]:
    """Let NLTK and ours take turns; return their rates, and the number of tokens.

    Raises:
        RuntimeError: If their counts differ.
    """
    texts = captions.to_pylist()
    rates: Rates = {"nltk": [], "cold": [], "warm": []}
    for number in range(rounds):
        sys.stderr.write(f"round {number + 1} of {rounds}\n")
        expected, took_s = counting.timed(partial(counting.count_by_nltk, texts))
        rates["nltk"].append(len(texts) / took_s)
        ours = counting.Ours()
        _, took_s = counting.timed(partial(ours.add, captions))
        rates["cold"].append(len(texts) / took_s)
        _require_equal(expected, ours.counts())
        passes, start_s = 0, time.process_time()
        while time.process_time() - start_s < _WARM_S:
            ours.add(captions)
            passes += 1
        rates["warm"].append(passes * len(texts) / (time.process_time() - start_s))
    return rates, ours.num_tokens // (passes + 1)


def _require_equal(expected: Counter[tuple[str, str]], found: Counter[tuple[str, str]]) -> None:
    if expected != found:
        different = next(iter((expected - found) | (found - expected)))
        raise RuntimeError(
            f"{different}: expected the count {expected[different]} of NLTK, found {found[different]}; do not trust "
            "these times, and report this line"
        )


def ratio(rates: Rates, way: str) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios to NLTK, the lowest and the highest."""
    values = [ours / theirs for ours, theirs in zip(rates[way], rates["nltk"], strict=True)]
    return statistics.median(values), min(values), max(values)


def table(found: dict[str, tuple[Rates, int, int]]) -> str:
    """Return rates, ratios and limits as text; `found` has rates, captions and tokens of each set."""
    lines = [f"{'':<24}{'captions/s':>12}{'Mtokens/s':>11}{'at least':>10}{'times NLTK':>28}"]
    for name, (rates, num_captions, num_tokens) in found.items():
        for way, values in rates.items():
            rate = statistics.median(values)
            label = f"{name}, {way}{'*' * (way == 'cold')}"
            line = f"{label:<24}{rate:>12,.0f}{rate * num_tokens / num_captions / 1e6:>11.3f}"
            if way != "nltk":
                median, lowest, highest = ratio(rates, way)
                verdict = "PASS" if median >= LIMITS[name, way] else "MISSED"
                line += f"{LIMITS[name, way]:>10}{f'{median:.1f} ({lowest:.1f}..{highest:.1f}) {verdict:<6}':>28}"
            lines.append(line.rstrip())
    lines.append(f"* an engine that has met the {len(PROOF)} captions of its proof, and no others")
    return "\n".join(lines)


def missed(found: dict[str, tuple[Rates, int, int]]) -> bool:
    """Tell whether a ratio is below its limit."""
    return any(ratio(found[name][0], way)[0] < limit for (name, way), limit in LIMITS.items())


def start(*words: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a process of `benchmarks.counting`."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.counting", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, **environment},
    )


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Read a line of JSON from a process.

    Raises:
        RuntimeError: If it ended without one.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r}: ended with {process.wait()}; its error stands above")
    found: dict[str, Any] = json.loads(line)
    return found


def run(*words: str, **environment: str) -> dict[str, Any]:
    """Run a process of `benchmarks.counting` to its end; return its answer."""
    with start(*words, **environment) as process:
        return answer(process)


def starts() -> str:
    """Show what starting takes, on a machine that has not compiled anything and on one that has."""
    with tempfile.TemporaryDirectory() as folder:
        first = run("start", NUMBA_CACHE_DIR=folder)
        later = run("start", NUMBA_CACHE_DIR=folder)
    memory = ", ".join(f"{what} {size >> 20} MiB" for what, size in later["memory"].items())
    return (
        f"opening the engine: {later['cpu_s']:.1f} s of CPU; on a machine's first run {first['cpu_s']:.1f} s, most of "
        f"it compilation\nmemory: {memory}"
    )


def scaling(seconds: float) -> str:
    """Show the captions per second of one process, and of two at once."""
    rates = {}
    for count in (1, 2):
        processes = [start("pass", str(seconds)) for _ in range(count)]
        for process in processes:
            answer(process)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [answer(process) for process in processes]
        rates[count] = [sum(found["num_captions"] / found[clock] for found in answers) for clock in ("wall_s", "cpu_s")]
        for process in processes:
            process.communicate()
    (wall, cpu), (wall2, cpu2) = rates[1], rates[2]
    return (
        f"dense captions, warm: one process {wall:,.0f} captions/s, two {wall2:,.0f}, {wall2 / wall:.2f} times as "
        f"many; each by its CPU time, {cpu2 / cpu:.2f} times"
    )


def reading(num_captions: int) -> str:
    """Show captions per CPU-second from Parquet, read alone and read and counted."""
    with tempfile.TemporaryDirectory() as folder:
        return reading_line(run("read", folder, str(num_captions)))


def reading_line(found: dict[str, Any]) -> str:
    """Return what reading took as text, with what kind of captions it was."""
    alone, counted = (found[way]["num_captions"] / found[way]["cpu_s"] for way in ("read", "counted"))
    return (
        f"{found['read']['num_captions']:,} captions from Parquet, {found['size_bytes'] / 1e6:,.0f} MB, "
        f"{1 - found['share_alt_text']:.0%} dense and {found['share_alt_text']:.0%} alt-texts, drawn with repetition: "
        f"{found['num_distinct']:,} different ones, so most have been met before, and the rate is a warm one: reading "
        f"alone {alone:,.0f} captions per CPU-second, reading and counting {counted:,.0f}"
    )


def memory(num_captions: int) -> tuple[str, bool, dict[str, Any]]:
    """Show what counting a stream of captions takes; tell whether the limit is missed."""
    with tempfile.TemporaryDirectory() as folder:
        found = run("zipf", folder, str(num_captions))
    return memory_line(num_captions, found), memory_verdict(num_captions, found["peak_bytes"]) == "MISSED", found


def memory_verdict(num_captions: int, peak_bytes: int) -> str:
    """Judge a peak, at the number of captions that the limit is for."""
    if num_captions != ZIPF_LIMIT_CAPTIONS:
        return "not judged at this size"
    return "PASS" if peak_bytes < ZIPF_LIMIT_BYTES else "MISSED"


def memory_line(num_captions: int, found: dict[str, Any]) -> str:
    """Return what counting a stream of captions took as text."""
    return (
        f"{num_captions:,} captions of {found['num_words']:,} distinct words: peak {found['peak_bytes'] / 1e9:.2f} GB, "
        f"{found['merging_bytes'] / 1e9:.2f} of it for merging (below {ZIPF_LIMIT_BYTES / 1e9:g} for "
        f"{ZIPF_LIMIT_CAPTIONS:,}): {memory_verdict(num_captions, found['peak_bytes'])}; "
        f"{found['rate']:,.0f} captions per CPU-second, merging {found['merge_s']:.0f} s, {found['num_rows']:,} rows"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a limit was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zipf-captions", type=int, default=ZIPF_CAPTIONS, help="its limit is for 10000000")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if (SHARED / "nltk_data").is_dir():
        os.environ.setdefault("NLTK_DATA", str(SHARED / "nltk_data"))
    try:
        counting.Ours()
    except PixArtError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    found = {}
    for name, captions in load().items():
        sys.stderr.write(f"{name}: {len(captions):,}\n")
        rates, num_tokens = measure(captions, options.rounds)
        found[name] = (rates, len(captions), num_tokens)
    sys.stdout.write(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\n\n{table(found)}\n\n")
    for show in (starts, lambda: scaling(5.0), lambda: reading(200_000)):
        sys.stdout.write(f"{show()}\n")
        sys.stdout.flush()
    text, too_much, peak = memory(options.zipf_captions)
    sys.stdout.write(f"{text}\n")
    if options.json:
        rates_of = {name: rates for name, (rates, _, _) in found.items()}
        options.json.write_text(json.dumps({"machine": machine(), "rates": rates_of, "memory": peak}, indent=1))
    return int(missed(found) or too_much)


if __name__ == "__main__":
    sys.exit(main())
