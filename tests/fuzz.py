"""Hostile captions by the hundred thousand, tagged by the compiled engine and by NLTK: no difference is allowed.

Captions come in batches, each from a seed of its own; what differs is cut down to the least that still does and printed
as a Python literal with its seed. Run all of it with `python -m tests.fuzz`, one batch again with `--first-seed`.
"""

import argparse
import functools
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pixart_data.nouns import NounCounter
from pixart_data.tagging.blocks import Block
from pixart_data.tagging.compiled import CompiledEngine
from pixart_data.tagging.proof import CAPTIONS
from pixart_data.tagging.references import NltkEngine
from pixart_data.tagging.resources import find_resources

BATCH = 500
SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "nltk_data"


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(" "))


_WORDS = _split(
    "a the The dog dogs Dog's it It's it'll THEY'VE don't DON'T can't cannot Cannot gimme gonna gotta lemme wanna "
    "more'n d'ye 'tis 'Twas 'em o'clock rock'n'roll friends' James's the U.S. U.S.A. Mr. mrs. Dr. St. No. no. vs. e.g. "
    "i.e. etc. Inc. Jan. J. j. R. I. Ph.D. p.m. a.m. www.example.com http://a.b/c?d=e&f#g x@y.z well-known -dash dash- "
    "a--b 3 3. 3.5 .5 1,000 1,000. 10:30 $5 5% #1 1990s '90s 3x4 24-105mm f/2.8 ½ ² ٣ ٣. 5° naïve café Ünal straße İst "
    "\u017ft KELVIN \u212a москва 東京 タワー 서울 ﬁne ǅ x\u0301 a\u200bb \ufeff \U00020000 \U0001f600 "
    "👩\u200d👩\u200d👧 \x00 \ufffd _ __ a_b A I"
)
_MARKS = (
    *".,:;?!'\"`()[]{}<>-–—‒―…*@#$%&/\\|~^+=_“”‘’«»„‹›¿¡·•°",
    *_split(
        "'' '' `` \"\" .. ... .... -- --- ?! !! !!! ?? ). .) .\" \". .' '. .” ”. ,' ;) :-) 's 'S 'll n't N'T 're ('' "
        '("'
    ),
)
_GAPS = (
    *" " * 60, *"\n\n\t\r", "  ", " \n", "\n\n", "\r\n", "\u00a0", "\u00a0", " \u00a0", "\u3000", "\u2003", "\x0b",
    "\x1c", "\x85",
)  # fmt: skip


def captions(seed: int, count: int = BATCH) -> list[str | None]:
    """Return the captions of a seed."""
    rng = random.Random(seed)
    return [None if rng.random() < 0.005 else rng.choice(_KINDS)(rng) for _ in range(count)]


def _soup(rng: random.Random) -> str:
    """Pieces of all kinds, some joined, some apart."""
    parts = []
    for _ in range(rng.randint(1, rng.choice((3, 12, 30)))):
        parts.append(rng.choice(_WORDS if rng.random() < 0.5 else _MARKS))
        parts.append(rng.choice(_GAPS) if rng.random() < 0.6 else "")
    return "".join(parts)


def _sentences(rng: random.Random) -> str:
    """Words apart, with marks around some of them: most go through compiled code."""
    parts = []
    for _ in range(rng.randint(2, 25)):
        word = rng.choice(_WORDS)
        before = rng.choice(_MARKS) if rng.random() < 0.1 else ""
        after = rng.choice(_MARKS) if rng.random() < 0.3 else ""
        parts.append(before + word + after)
    return " ".join(parts)


def _letters(rng: random.Random) -> str:
    """Characters at random: from a few that rules name, or from all there are."""
    few = "a.B'\" ,-?!()\n1s’”“:" if rng.random() < 0.7 else None
    codes = (ord(rng.choice(few)) if few else rng.randrange(rng.choice((0x100, 0x3000, 0x21000))) for _ in range(40))
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)[: rng.randint(1, 40)]


def _long(rng: random.Random) -> str:
    """One piece over and over: long chunks, long runs, many sentences."""
    piece = rng.choice(_WORDS) + rng.choice(_MARKS) + rng.choice(("", " ", rng.choice(_GAPS)))
    return rng.choice(CAPTIONS)[:40] + piece * rng.randint(2, rng.choice((5, 60, 200)))


def _mutated(rng: random.Random) -> str:
    """A sentence of the project's own, with a few things done to it."""
    text = rng.choice(CAPTIONS)
    if rng.random() < 0.3:
        text = text + rng.choice(_GAPS) + rng.choice(CAPTIONS)
    text = text[:400]
    for _ in range(rng.choice((0, 1, 2, 5))):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.randint(0, 3))
        new = rng.choice(
            (rng.choice(_MARKS), rng.choice(_WORDS), rng.choice(_GAPS), "", text[at:end] * 2, text[at:end].swapcase())
        )
        text = text[:at] + new + text[end:]
    return text


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    *(_soup,) * 7, *(_sentences,) * 7, *(_mutated,) * 10, *(_letters,) * 3, _long,
)  # fmt: skip


class Trial:
    """Both engines, on one vocabulary."""

    def __init__(self) -> None:
        self.engine = CompiledEngine(find_resources())
        self.reference = NltkEngine(self.engine.vocabulary)

    def differing(self, batch: Sequence[str | None]) -> list[int]:
        """Return which captions the engines do not tag alike; and none if they only count nouns differently: -1."""
        array = pa.array(batch, pa.string())
        found, expected = self.engine.tag(array), self.reference.tag(array)
        wrong = [i for i in range(len(batch)) if not _is_same(found, expected, i)]
        return wrong or ([] if self._counts(found).equals(self._counts(expected)) else [-1])

    def _counts(self, block: Block) -> pa.Table:
        counter = NounCounter("nltk", False, self.engine.vocabulary)
        counter.add(block)
        counts = counter.take()
        return counts.table.sort_by([("surface", "ascending"), ("tag", "ascending")])

    def shrunk(self, caption: str) -> str:
        """Cut a caption that differs down to the least that still does."""
        step = max(1, len(caption) // 2)
        while step:
            for start in range(0, len(caption), step):
                shorter = caption[:start] + caption[start + step :]
                if self.differing([shorter]):
                    caption = shorter
                    break
            else:
                step //= 2
        return caption

    def explained(self, seed: int, batch: Sequence[str | None], number: int) -> str:
        """Return a line about a caption that differs."""
        if number < 0:
            return f"seed {seed}: same tags, but other counts"
        caption = batch[number]
        return f"seed {seed}, caption {number}: {self.shrunk(caption)!r}" if caption else f"seed {seed}: {caption!r}"


def _is_same(one: Block, other: Block, caption: int) -> bool:
    first, last = slice(*one.offsets[caption : caption + 2]), slice(*other.offsets[caption : caption + 2])
    return bool(one.counted[caption] == other.counted[caption]) and all(
        np.array_equal(mine[first], theirs[last])
        for mine, theirs in ((one.words, other.words), (one.tags, other.tags), (one.begins, other.begins))
    )


@functools.cache
def _trial() -> Trial:
    """One for each process."""
    return Trial()


def _run(seed: int) -> tuple[list[str], int, int]:
    """Try a seed; return what went wrong, how many captions NLTK had to do, and of how many."""
    trial = _trial()
    tokenizer = trial.engine.tokenizer
    declined, batch = tokenizer.num_declined, captions(seed)
    problems = [trial.explained(seed, batch, number) for number in trial.differing(batch)[:3]]
    return problems, tokenizer.num_declined - declined, len(batch)


def provide_data() -> None:
    """Let NLTK find its data files: those beside the checkout, else the user's, else a miniature of them."""
    if "NLTK_DATA" not in os.environ and SHARED_DATA.is_dir():
        os.environ["NLTK_DATA"] = str(SHARED_DATA)
    elif "NLTK_DATA" not in os.environ:
        from tests.grammars import write_nltk_data

        folder = Path(tempfile.mkdtemp(prefix="nltk_data_"))
        write_nltk_data(folder)
        os.environ["NLTK_DATA"] = str(folder)


def main() -> int:
    """Try all captions and say how it went."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--captions", type=int, default=100_000)
    options.add_argument("--first-seed", type=int, default=0)
    options.add_argument("--processes", type=int, default=2)
    args = options.parse_args()
    provide_data()
    seeds = range(args.first_seed, args.first_seed + -(-args.captions // BATCH))
    started_s, tried, declined, failures = time.monotonic(), 0, 0, 0
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for done, (problems, by_nltk, count) in enumerate(pool.imap_unordered(_run, seeds), 1):
            tried, declined, failures = tried + count, declined + by_nltk, failures + len(problems)
            for problem in problems:
                sys.stdout.write(f"DIFFERS {problem}\n")
            if done % 20 == 0:
                sys.stderr.write(f"{tried} captions, {failures} differ, {time.monotonic() - started_s:.0f} s\n")
    share = 1 - declined / tried
    took = f"{tried} captions in {time.monotonic() - started_s:.0f} s"
    sys.stdout.write(f"{took}, {share:.1%} of them by compiled code alone: {failures} differ from NLTK\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
