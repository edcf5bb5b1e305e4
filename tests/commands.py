"""What the commands that look at a dataset, or make another of it, do with one that is damaged.

Each takes one feature set of the dataset of tests/corruption.py, and returns what it made of it, as bytes that compare.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipelines.packs import PackStage
from pixart_data import partitions
from pixart_data.differences import compare
from pixart_data.editions import Original
from pixart_data.entries import ENTRIES
from pixart_data.errors import PixArtError
from pixart_data.packs import bucket_ranks, make_groups, plan_generation
from pixart_data.pairs import Pairs
from pixart_data.shards import INDEX, REJECTED_FILE, FeatureSet
from pixart_data.surveys import survey

IMAGES = "256px"
NO_NAMES = np.empty(0, np.uint64)
HUGE = 1 << 40

Made = dict[str, bytes]


def compacted(root: Path, name: str, folder: Path) -> Made:
    """Plan the packs of a set, and copy the first."""
    original = Original(root / name)
    groups = make_groups(original, NO_NAMES)
    generation = plan_generation(folder, 0, original, groups, bucket_ranks(original, None), HUGE, write=True)
    assert generation is not None
    record = PackStage(folder, root / name)(generation.packs[0], lambda done, left: None)
    return {file.path: (folder / file.path).read_bytes() for file in record.files}


def halved(root: Path, name: str, folder: Path) -> Made:
    """Split a set in two by share."""
    partition = partitions.by_share(root / name, {"one": 0.5, "other": 0.5})
    for _ in partitions.write(partition, folder):
        pass
    tables = (path for path in folder.rglob("*") if path.name in (INDEX, ENTRIES, REJECTED_FILE))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in tables}


def exported(root: Path, name: str, folder: Path) -> Made:
    """Read all samples as `export` does."""
    pairs = Pairs(root / IMAGES, root / ("text" if name == IMAGES else name))
    try:
        null = pairs.null_caption()
        made = {"null": b"" if null is None else null.tobytes()}
        for pair in pairs.rows(0, len(pairs)):
            key = pair.image["key"]
            made[f"{key} row"] = repr((pair.image["original_height_px"], pair.text["caption"])).encode()
            made[f"{key} moments"] = pairs.moments(pair).tobytes()
            made[f"{key} text"] = pairs.text(pair).tobytes()
        return made
    finally:
        pairs.close()


def looked_at(root: Path, name: str, folder: Path) -> Made:
    """Look at a set as `inspect` does; that says what it finds, so that there is nothing to compare."""
    features = FeatureSet(root / name)
    try:
        survey(features, 1)
        features.keys([0])
    finally:
        features.close()
    return {}


COMMANDS: tuple[Callable[[Path, str, Path], Made], ...] = (compacted, halved, exported, looked_at)


class Commands:
    """A dataset that is going to be damaged, and what each command makes of each of its sets before.

    Args:
        whole: A dataset with the same contents, which stays as it is.
        folder: For what commands write.
    """

    def __init__(self, root: Path, whole: Path, folder: Path) -> None:
        self.root, self.whole, self.folder = root, whole, folder
        self._made: dict[tuple[str, str], Made] = {}

    def complaints(self, damaged: Path) -> Iterator[str]:
        """Yield what is wrong with what commands do now that a file of the dataset is damaged."""
        name = damaged.relative_to(self.root).parts[0]
        for command in COMMANDS:
            expected = self._expected(command, name)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                try:
                    made = command(self.root, name, Path(folder))
                except PixArtError:
                    continue
                except Exception as error:  # noqa: BLE001 - whatever it is, a user would see a traceback
                    yield f"{command.__name__}: {error!r}"
                    continue
            if made != expected:
                yield f"{command.__name__}: other samples than before"
        try:
            list(compare(self.whole, self.root, 1))
        except PixArtError:
            pass
        except Exception as error:  # noqa: BLE001 - as above
            yield f"diff: {error!r}"

    def _expected(self, command: Callable[[Path, str, Path], Made], name: str) -> Made:
        if (command.__name__, name) not in self._made:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                self._made[command.__name__, name] = command(self.whole, name, Path(folder))
        return self._made[command.__name__, name]
