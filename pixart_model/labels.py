"""The classes of images, to train DiT without captions: from a table by key, or the folders that the images lie in.

A key is `FOLDER/SUB/FILE`, percent-encoded; its class is the last folder, `SUB`. Folders count in the order of their
names, those of all datasets together, whether samples of them are chosen or not: a query does not renumber classes.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import FeatureSet
from pixart_data.storage import require_there
from pixart_model.config import Data
from pixart_model.roster import Joined
from pixart_model.subset import narrowed
from pixart_model.tables import KEY, batches, open_index, open_table, read_keyed, rows_of

LABEL = "label"

_SHOWN = 3
_TABLE = "name a table with columns key and label as data.labels"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of the rows of an image set's index.

    Attributes:
        of_rows: From 0, -1 where a row has none; int32 (rows,).
        num_classes: How many there are.
        names: Of the classes, where they are folders.
    """

    of_rows: npt.NDArray[np.int32]
    num_classes: int
    names: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class _Folders:
    """The folders of an image set: the name of each, and the number of its folder for each row."""

    images: FeatureSet
    names: list[str]
    of_rows: npt.NDArray[np.int32]
    example: str


def read_labels(sets: Sequence[FeatureSet], data: Data, num_classes: int) -> list[Labels]:
    """Return the labels of image sets whose classes are numbered together.

    Raises:
        ConfigError: If there are other classes than `num_classes`, or the job's table or file of names cannot be used.
        DataError: If the table or an index is damaged, or labels are missing or repeated.
    """
    if data.labels is not None:
        return _from_table(Path(data.labels), sets, num_classes)
    folders = [_folders(images) for images in sets]
    names = _class_names(folders, data, num_classes)
    number = {name: i for i, name in enumerate(names)}
    result = []
    for one in folders:
        numbers = np.array([number[name] for name in one.names] or [-1], np.int32)
        result.append(Labels(numbers[one.of_rows], num_classes, names))
    return result


def labels_of(labels: Labels, images: FeatureSet, joined: Joined) -> npt.NDArray[np.int32]:
    """Return the labels of the samples of a plan, int32 (samples,); -1 where one has none."""
    own: npt.NDArray[np.int32] = labels.of_rows[images.entries["row"][joined.images]]
    return own


def require_labelled(labels: Labels, images: FeatureSet, joined: Joined, data: Data) -> None:
    """Check that every sample has a label, and tell how many classes have samples.

    Raises:
        DataError: Saying how many have none, and which is the first.
    """
    own = labels_of(labels, images, joined)
    without = np.flatnonzero(own < 0)
    if len(without):
        entry = images.entries[joined.images[without[0]]]
        [key] = images.keys([int(entry["row"])])
        advice = "add them"
        if data.scores in (None, data.labels):
            where = narrowed(data.where, f"{LABEL} >= 0")
            advice += f", or leave these out with data.scores = '{data.labels}' and data.where = {where}"
        raise DataError(
            f"{data.labels}: expected a row for each of {len(own)} samples of {images.root}, found none for "
            f"{len(without)}, {key} first; {advice}"
        )
    counts = np.bincount(own, minlength=labels.num_classes)
    seen = counts[counts > 0]
    _log.info(
        "%s: %d of %d classes have samples, %d to %d each",
        images.root, len(seen), labels.num_classes, seen.min(), seen.max(),
    )  # fmt: skip


# From a table


def _from_table(path: Path, sets: Sequence[FeatureSet], num_classes: int) -> list[Labels]:
    require_there(path, "data.labels")
    file = open_table(path)
    names = file.schema_arrow.names
    if LABEL not in names:
        raise ConfigError(f"data.labels: {path}: expected a column {LABEL}, found {', '.join(names)}; rename one")
    kind = file.schema_arrow.field(LABEL).type
    if not pa.types.is_integer(kind):
        raise ConfigError(
            f"data.labels: {path}: expected whole numbers in column {LABEL}, found {kind}; write them as int64"
        )
    hashes, columns = read_keyed("data.labels", path, file, [LABEL])
    column = columns[LABEL]
    if column.null_count:
        raise DataError(f"{path}: expected a label in each row, found none in {column.null_count} rows; delete those")
    given = column.to_numpy()
    outside = np.flatnonzero((given < 0) | (given >= num_classes))
    if len(outside):
        high = int(given.max())
        advice = f"correct them, or set model.num_classes = {high + 1}"
        if given.min() > 0 and high == num_classes:
            advice = "labels count from 0: subtract 1 from all"
        elif given.min() < 0:
            advice = "correct them: labels count from 0"
        raise ConfigError(
            f"data.labels: {path}: expected labels from 0 to {num_classes - 1} (model.num_classes), found "
            f"{len(outside)} others in {len(given)} rows, {given[outside[0]]} in row {outside[0]} first; {advice}"
        )
    labels = np.append(given.astype(np.int32), np.int32(-1))  # the last one is row -1's
    return [Labels(labels[rows_of(path, hashes, images)], num_classes) for images in sets]


# From folders


def _folders(images: FeatureSet) -> _Folders:
    index = open_index(images)
    of_paths = np.empty(index.metadata.num_rows, np.int32)
    paths: dict[str, int] = {}
    example, bare = "", 0
    for first, rows in batches(index, [KEY]):
        keys = rows[KEY].combine_chunks()
        bare += len(keys) - pc.sum(pc.match_substring(keys, "/")).as_py()
        example = example or keys[0].as_py()
        parts = pc.split_pattern(keys, "/", max_splits=1, reverse=True)
        encoded = pc.list_element(parts, 0).dictionary_encode()
        own = np.array([paths.setdefault(path, len(paths)) for path in encoded.dictionary.to_pylist()], np.int32)
        of_paths[first : first + len(keys)] = own[encoded.indices.to_numpy()]
    if bare:
        raise ConfigError(
            f"data.labels: {images.root}: expected keys with a folder in them, which is the class, found {bare} "
            f"without, such as {example!r}; {_TABLE}"
        )
    # One name may be a folder in several: train/n01440764 and more/n01440764.
    names = [unquote(path.rpartition("/")[2], errors="surrogateescape") for path in paths]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    own = np.array([number[name] for name in names] or [-1], np.int32)
    return _Folders(images, list(number), own[of_paths], example)


def _class_names(folders: Sequence[_Folders], data: Data, num_classes: int) -> list[str]:
    """Return the names of the classes, in order."""
    found = sorted({name for one in folders for name in one.names})
    if data.classes is not None:
        return _listed(Path(data.classes), found, num_classes)
    if len(found) == num_classes:
        return found
    shown = ", ".join(map(repr, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
    where = ", ".join(str(one.images.root) for one in folders)
    advice = f"set model.num_classes = {len(found)}"
    if len(found) < num_classes:
        advice += ", or list the names of all classes in a file, one in each line, and name it as data.classes"
    raise ConfigError(
        f"model.num_classes: expected {len(found)}, as many as the folders that images of {where} lie in ({shown}; of "
        f"the key {folders[0].example!r}, the last folder), got {num_classes}; {advice}, or, where folders are not "
        f"classes, {_TABLE}"
    )


def _listed(path: Path, found: Sequence[str], num_classes: int) -> list[str]:
    """Read the names of the classes from a file, which must hold all folders."""
    require_there(path, "data.classes")
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.classes: {path}: expected a text file in UTF-8 with one name in each line: {error}; write it anew"
        ) from error
    [(most, count)] = Counter(names).most_common(1) or [("", 0)]
    if count > 1:
        raise ConfigError(f"data.classes: {path}: expected each name once, found {most!r} {count} times; delete one")
    if len(names) != num_classes:
        raise ConfigError(
            f"data.classes: {path}: expected {num_classes} names (model.num_classes), found {len(names)}; correct one "
            "of the two"
        )
    others = sorted(set(found) - set(names))
    if others:
        raise ConfigError(
            f"data.classes: {path}: expected the name of every folder that images lie in, found none of "
            f"{len(others)} of {len(found)}, {others[0]!r} first; add them, or leave their images out of the set"
        )
    return names
