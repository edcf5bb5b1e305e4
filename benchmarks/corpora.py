"""Captions to count: real ones where they lie beside the checkout, else made up; and any number of a known spread."""

import itertools
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DENSE, ALT_TEXT = "dense captions", "alt-texts"
SHARED = Path(__file__).parent.parent.parent / "shared"

_FILES = {DENSE: ("llava_coco.parquet", "vlm_other.parquet"), ALT_TEXT: ("laion_alt_text.parquet",)}
_MADE_UP = {DENSE: 1750, ALT_TEXT: 5000}
_LETTERS = np.frombuffer(b"etaoinshrdlucmfwygpbvkxqjz", np.uint8)
_WORD_BYTES = 10
_AT_ONCE = 1 << 16

_NOUNS = ("dog", "cat", "table", "kitchen", "street", "woman", "man", "child", "bench", "horse", "train", "umbrella")
_ADJECTIVES = ("small", "red", "wooden", "old", "bright", "striped", "empty", "well-lit", "black-and-white", "blurry")
_VERBS = ("sits near", "stands behind", "is leaning against", "walks towards", "can't reach", "isn't far from", "holds")


def load(folder: Path = SHARED / "captions") -> dict[str, pa.Array]:
    """Return dense captions and alt-texts, by their names."""
    if folder.is_dir():
        return {
            name: pa.concat_arrays(
                itertools.chain.from_iterable(pq.read_table(folder / file)["caption"].chunks for file in files)
            )
            for name, files in _FILES.items()
        }
    chance = random.Random(0)
    made = {DENSE: lambda: " ".join(_sentence(chance) for _ in range(8)), ALT_TEXT: lambda: _alt_text(chance)}
    return {name: pa.array([made[name]() for _ in range(count)]) for name, count in _MADE_UP.items()}


def _sentence(chance: random.Random) -> str:
    one, other = (f"{chance.choice(_ADJECTIVES)} {chance.choice(_NOUNS)}" for _ in range(2))
    end = chance.choice((".", ", which looks calm.", "; it's raining.", "!", ', and a sign reads "Open".'))
    return f"The {one} {chance.choice(_VERBS)} a {other}{end}"


def _alt_text(chance: random.Random) -> str:
    """Half of its words are new, as in alt-texts from the web."""
    names = ("".join(chance.choices("abcdefghiklmnoprstuw", k=chance.randint(3, 9))).title() for _ in range(4))
    rest = (chance.choice(_NOUNS), f"{chance.randint(1, 2500)}", chance.choice(("-", "|", "(new)", "& more", "...")))
    words = [*names, *rest]
    chance.shuffle(words)
    return " ".join(words)


class Zipf:
    """Captions of ten words; the word of rank r is drawn with a probability in proportion to 1 / r.

    Of 4 million words, 10 million captions hold 3.7 million: about what alt-texts of that number would.
    """

    def __init__(self, num_words: int, seed: int = 0) -> None:
        self._chance = np.random.default_rng(seed)
        self._words = _spelled(num_words)

    def captions(self, count: int) -> pa.Array:
        """Return so many more captions, of type string."""
        shares = self._chance.random(count * 10)
        ranks = np.exp(shares * np.log(len(self._words) + 1)).astype(np.int64) - 1
        offsets = np.arange(0, count * 10 + 1, 10, dtype=np.int32)
        return pc.binary_join(pa.ListArray.from_arrays(offsets, self._words.take(pa.array(ranks))), " ")


def _spelled(count: int) -> pa.Array:
    """Return distinct words of letters, short ones first: ranks, written with letters for digits."""
    return pa.concat_arrays([_spell(np.arange(i, min(i + _AT_ONCE, count))) for i in range(0, count, _AT_ONCE)])


def _spell(ranks: npt.NDArray[np.int64]) -> pa.Array:
    columns: list[npt.NDArray[np.uint8]] = []
    sizes = np.full(len(ranks), 2)
    for place in range(_WORD_BYTES):
        columns.append(_LETTERS[ranks % len(_LETTERS)])
        ranks = ranks // len(_LETTERS)
        sizes += (ranks > 0) & (place > 0)
    kept = np.arange(_WORD_BYTES) < sizes[:, None]
    text = np.stack(columns, axis=1)[kept]
    ends = np.concatenate([np.zeros(1, np.int32), np.cumsum(sizes, dtype=np.int32)])
    return pa.StringArray.from_buffers(len(sizes), pa.py_buffer(ends.tobytes()), pa.py_buffer(text.tobytes()))
