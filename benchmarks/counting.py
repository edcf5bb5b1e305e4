"""What is timed of counting nouns, and the processes of its own that `benchmarks.count_nouns` starts.

    python -m benchmarks.counting start | pass SECONDS | read FOLDER CAPTIONS | zipf FOLDER CAPTIONS

Each answers with lines of JSON.
"""

import itertools
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.corpora import ALT_TEXT, DENSE, Zipf, load
from pixart_data.captions import CaptionFile
from pixart_data.columns import read_columns
from pixart_data.nouns import NounCounter, NounCounts
from pixart_data.tagging.blocks import NOUN_TAGS
from pixart_data.tagging.compiled import CompiledEngine
from pixart_data.tagging.engines import open_engine

T = TypeVar("T")

_BLOCK = 16_384
_UNIT = 1_000_000
_ZIPF_WORDS = 4_000_000
_ALT_TEXT_EVERY = 10


class Ours:
    """The engine and the counter of `pixart stats`, just opened.

    Raises:
        RuntimeError: If the engine is not the compiled one; why is logged.
    """

    def __init__(self) -> None:
        engine = open_engine("nltk")
        if not isinstance(engine, CompiledEngine):
            raise RuntimeError(f"{engine.name}: expected the compiled engine; the warning above says what to do")
        self.engine = engine
        self.counter = NounCounter(engine.name, engine.approximate, engine.vocabulary)
        self.num_tokens = 0

    def add(self, captions: pa.Array) -> None:
        """Tag captions and count their nouns."""
        block = self.engine.tag(captions)
        self.num_tokens += len(block.words)
        self.counter.add(block)

    def counts(self) -> Counter[tuple[str, str]]:
        """Return the counts of nouns since the last time, by surface and tag."""
        found = self.counter.take().table
        nouns = zip(found["surface"].to_pylist(), found["tag"].to_pylist(), strict=True)
        return Counter(dict(zip(nouns, found["count"].to_pylist(), strict=True)))


def count_by_nltk(texts: Sequence[str | None]) -> Counter[tuple[str, str]]:
    """Count the nouns of captions as one would with NLTK alone."""
    import nltk

    counts: Counter[tuple[str, str]] = Counter()
    for text in texts:
        if text and text.strip():
            counts.update(pair for pair in nltk.pos_tag(nltk.word_tokenize(text)) if pair[1] in NOUN_TAGS)
    return counts


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Do some work; return its result and the CPU seconds of this process that it took."""
    start_s = time.process_time()
    result = work()
    return result, time.process_time() - start_s


def show_start() -> None:
    """Tell what opening the engine takes, and memory at each step."""
    memory = {"without the engine": _resident_bytes()}
    ours, took_s = timed(Ours)
    memory["with it"] = _resident_bytes()
    for captions in load().values():
        ours.add(captions)
    memory["after all captions"] = _resident_bytes()
    _say(cpu_s=took_s, memory=memory)


def show_pass(seconds: float) -> None:
    """Count dense captions for some seconds, when told to."""
    captions = load()[DENSE]
    ours = Ours()
    ours.add(captions)
    _say(ready=True)
    sys.stdin.readline()
    passes, wall_s, cpu_s = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall_s < seconds:
        ours.add(captions)
        passes += 1
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    _say(num_captions=passes * len(captions), wall_s=wall_s, cpu_s=cpu_s)


def show_reading(folder: Path, num_captions: int) -> None:
    """Read captions from Parquet, with and without counting them: those at hand, drawn with repetition."""
    corpora = {name: captions.to_pylist() for name, captions in load().items()}
    chance = random.Random(0)
    texts = [chance.choice(corpora[ALT_TEXT if i % _ALT_TEXT_EVERY == 0 else DENSE]) for i in range(num_captions)]
    path = folder / "captions.parquet"
    # The same captions recur: a dictionary, or a codec that looks far back, would store and read each but once.
    pq.write_table(
        pa.table({"caption": texts}), path, row_group_size=1 << 15, use_dictionary=False, compression="snappy"
    )
    ours = Ours()
    found = {}
    for name, use in (("read", len), ("counted", ours.add)):
        count, took_s = timed(partial(_read, path, use))
        found[name] = {"num_captions": count, "cpu_s": took_s}
    _say(size_bytes=path.stat().st_size, share_alt_text=1 / _ALT_TEXT_EVERY, num_distinct=len(set(texts)), **found)


def _read(path: Path, use: Callable[[pa.Array], object]) -> int:
    count = 0
    for rows in read_columns(CaptionFile("captions", str(path), ""), "caption"):
        use(rows.captions)
        count += len(rows.captions)
    return count


def show_zipf(folder: Path, num_captions: int) -> None:
    """Count a stream of captions unit by unit, as a worker does, and merge the units, as the driver does."""
    parts, num_words, took_s = _count_stream(folder, num_captions)
    counting_bytes = _peak_bytes()
    whole, merge_s = timed(partial(_merged, parts))
    _say(
        num_words=num_words,
        peak_bytes=_peak_bytes(),
        merging_bytes=_peak_bytes() - counting_bytes,
        rate=num_captions / took_s,
        merge_s=merge_s,
        num_rows=whole.table.num_rows,
    )


def _count_stream(folder: Path, num_captions: int) -> tuple[list[Path], int, float]:
    ours, stream = Ours(), Zipf(_ZIPF_WORDS)
    parts: list[Path] = []
    took_s, left = 0.0, num_captions
    while left > 0:
        rest = max(0, left - _UNIT)
        while left > rest:
            captions = stream.captions(min(left - rest, _BLOCK))
            took_s += timed(partial(ours.add, captions))[1]
            left -= len(captions)
        counts, spent_s = timed(ours.counter.take)
        took_s += spent_s
        parts.append(folder / f"{len(parts)}.parquet")
        pq.write_table(counts.to_table(), parts[-1])
        sys.stderr.write(f"{num_captions - left:,} captions, {_peak_bytes() / 1e9:.2f} GB\n")
    return parts, len(ours.engine.vocabulary), took_s


def _merged(parts: Sequence[Path]) -> NounCounts:
    def read() -> Iterator[NounCounts]:
        return (NounCounts.from_table(pq.read_table(path)) for path in parts)

    first = next(read())
    return first.merge(itertools.islice(read(), 1, None))


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _say(**found: Any) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Do what the command line says."""
    what, *rest = sys.argv[1:]
    if what == "start":
        show_start()
    elif what == "pass":
        show_pass(float(rest[0]))
    elif what == "read":
        show_reading(Path(rest[0]), int(rest[1]))
    else:
        show_zipf(Path(rest[0]), int(rest[1]))


if __name__ == "__main__":
    main()
