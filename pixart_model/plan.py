"""The plan of training data: which samples there are, joined once and kept for every process that asks.

`build` joins the entries of an image set with those of text sets into a plan file (`roster`), `cached_plan` keeps a
few such files in a local folder. In which order samples are trained on is `orders`'s.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from pixart_data.entries import IMAGE_ENTRY, TEXT_ENTRY
from pixart_data.errors import DataError
from pixart_data.retries import storage
from pixart_data.storage import TEMPORARY, discard, make_dir
from pixart_model.joins import EntriesFile, Keys, match, part_bits, read_entries
from pixart_model.roster import NONE, PIECE_BYTES, Counts, Joined, Numbers, open_plan, write_plan

MAX_PLANS = 8
"""Plan files that `cached_plan` keeps, besides those in use."""

_VERSION = 1  # of what decides a plan file's content
_LOCK = "plans.lock"
_log = logging.getLogger(__name__)


def build(
    images: EntriesFile,
    texts: Sequence[EntriesFile],
    num_buckets: int,
    out: Path,
    keep: npt.NDArray[np.bool_] | None = None,
) -> Counts:
    """Join an image set with text sets, checking every byte of their entries, and write a plan file.

    Memory: about 7 bytes for each image and 70 MB. Temporary space beside `out`: 12 bytes for each record of the image
    set and of the largest text set, 4 bytes for each image and text set.

    Args:
        images: Of an image set.
        texts: Of text sets; without any, every image that is wanted is a sample.
        num_buckets: Of the image set's table.
        out: On a local disk.
        keep: Of each row of the image set's index.parquet, whether it is wanted; all where None.

    Raises:
        DataError: If entries are missing or damaged, out of order, or a key is there twice.
        JobError: If the disk is full, or `out` cannot be written.
    """
    sizes = [_num_rows(images, IMAGE_ENTRY), *(_num_rows(one, TEXT_ENTRY) for one in texts)]
    bits = part_bits(sizes)
    make_dir(out.parent)
    with contextlib.ExitStack() as stack:
        image_keys = stack.enter_context(Keys(images.path, IMAGE_ENTRY, bits, out.parent))
        wanted, image_buckets = _read_images(images, image_keys, num_buckets, keep)
        has_text = np.full(len(wanted), not texts)
        if not texts:  # else the first match sees to it
            _require_distinct(image_keys)
        columns, without_image = [], []
        for one in texts:
            found = _match_texts(image_keys, one)
            without_image.append(_num_rows(one, TEXT_ENTRY) - int(np.count_nonzero(found != NONE)))
            has_text |= found != NONE
            columns.append(stack.enter_context(_spilled(found, out.parent)))
            del found  # before the next set is read
        samples = wanted & has_text
        counts = Counts(
            images=len(wanted),
            samples=int(np.count_nonzero(samples)),
            left_out=len(wanted) - int(np.count_nonzero(wanted)),
            without_text=int(np.count_nonzero(wanted & ~has_text)),
            texts=tuple(_num_texts(column, samples) for column in columns),
            texts_without_image=tuple(without_image),
        )
        bounds = np.concatenate([[0], np.cumsum(image_buckets)])
        buckets = [int(np.count_nonzero(samples[low:high])) for low, high in zip(bounds, bounds[1:], strict=False)]
        numbers = [_image_numbers(samples), *(_pieces(column, samples) for column in columns)]
        write_plan(out, _digest(images, texts, num_buckets, keep), counts, buckets, numbers)
    return counts


def cached_plan(
    folder: Path,
    images: EntriesFile,
    texts: Sequence[EntriesFile],
    num_buckets: int,
    keep: npt.NDArray[np.bool_] | None = None,
    max_plans: int = MAX_PLANS,
) -> Joined:
    """Open the plan of these sets in a folder; where it is not there, build it, once for all processes that ask.

    The others wait on a lock that the system takes back from a process that dies. More than `max_plans` files are not
    kept: those that nobody uses and that were opened longest ago go.

    Args:
        folder: On a local disk.
        max_plans: At least 1.

    Raises:
        DataError, JobError: As `build`.
    """
    path = folder / f"{_name(images, texts, num_buckets, keep)}.plan"
    joined = _opened_whole(path)
    if joined is not None:
        return joined
    make_dir(folder)
    with _locked(folder):
        joined = _opened_whole(path)  # another process may have built it meanwhile
        if joined is None:
            _sweep(folder, max_plans - 1)
            counts = build(images, texts, num_buckets, path, keep)
            _log.info("%s: built, %d samples of %d images", path, counts.samples, counts.images)
            joined = open_plan(path)
    return joined


# The parts of building


def _num_rows(file: EntriesFile, dtype: np.dtype[np.void]) -> int:
    try:
        num_rows = file.path.stat().st_size // dtype.itemsize
    except FileNotFoundError:
        num_rows = 0  # reading says what to do
    if num_rows >= NONE:
        raise DataError(f"{file.path}: expected fewer than {NONE} records, found {num_rows}; split the set")
    return num_rows


def _read_images(
    images: EntriesFile, keys: Keys, num_buckets: int, keep: npt.NDArray[np.bool_] | None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return whether each image is wanted, and how many images each bucket has."""
    wanted = np.ones(_num_rows(images, IMAGE_ENTRY), np.bool_)
    counts = np.zeros(num_buckets, np.int64)
    last = 0
    for first, records in read_entries(images, IMAGE_ENTRY):
        buckets, rows = records["bucket"].astype(np.int64), records["row"]
        if buckets[0] < last or np.any(buckets[1:] < buckets[:-1]) or buckets[-1] >= num_buckets:
            raise DataError(
                f"{images.path}: expected records in the order of {num_buckets} buckets, found another order from "
                f"record {first} on; run `pixart extract` again: this file is written anew"
            )
        last = int(buckets[-1])
        counts += np.bincount(buckets, minlength=num_buckets)
        if keep is not None:
            if int(rows.max()) >= len(keep):
                raise DataError(
                    f"{images.path}: expected rows below {len(keep)}, as in index.parquet, found {rows.max()}; "
                    "run `pixart extract` again: this file is written anew"
                )
            wanted[first : first + len(records)] = keep[rows]
        keys.add(records["key"].copy())
    keys.finish()
    return wanted, counts


def _require_distinct(keys: Keys) -> None:
    with Keys(keys.path, TEXT_ENTRY, keys.bits, keys.folder) as none:
        none.finish()
        match(keys, none)


def _match_texts(image_keys: Keys, texts: EntriesFile) -> Numbers:
    with Keys(texts.path, TEXT_ENTRY, image_keys.bits, image_keys.folder) as text_keys:
        for _, records in read_entries(texts, TEXT_ENTRY):
            text_keys.add(records["key"].copy())
        text_keys.finish()
        return match(image_keys, text_keys)


def _spilled(column: Numbers, folder: Path) -> IO[bytes]:
    """Return a nameless file that holds a column, so that several of them need not be in memory at once."""
    with storage(folder), contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        file.write(column.data)
        file.flush()
        stack.pop_all()
    return file


def _pieces(column: IO[bytes], samples: npt.NDArray[np.bool_]) -> Iterator[Numbers]:
    """Yield what a column holds of the samples, piece by piece."""
    column.seek(0)
    rows = PIECE_BYTES // 4
    for start in range(0, len(samples), rows):
        chosen = samples[start : start + rows]
        yield np.frombuffer(column.read(4 * len(chosen)), np.uint32)[chosen]


def _num_texts(column: IO[bytes], samples: npt.NDArray[np.bool_]) -> int:
    return sum(int(np.count_nonzero(piece != NONE)) for piece in _pieces(column, samples))


def _image_numbers(samples: npt.NDArray[np.bool_]) -> Iterator[Numbers]:
    rows = PIECE_BYTES // 4
    for start in range(0, len(samples), rows):
        yield (np.flatnonzero(samples[start : start + rows]) + start).astype(np.uint32)


def _name(
    images: EntriesFile, texts: Sequence[EntriesFile], num_buckets: int, keep: npt.NDArray[np.bool_] | None
) -> str:
    """Return the name of a plan in a cache: files that were replaced since have another, and are checked anew."""
    facts = [_digest(images, texts, num_buckets, keep)]
    for file in (images, *texts):
        with contextlib.suppress(FileNotFoundError):  # reading says what to do
            stat = file.path.stat()
            facts.append(f"{stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digest(
    images: EntriesFile, texts: Sequence[EntriesFile], num_buckets: int, keep: npt.NDArray[np.bool_] | None
) -> str:
    """Return what names the plan: the same sets, buckets and choice give the same."""
    chosen = None if keep is None else hashlib.sha256(np.packbits(keep).data).hexdigest() + f"/{len(keep)}"
    facts = [_VERSION, images.sha256, [text.sha256 for text in texts], num_buckets, chosen]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _opened_whole(path: Path) -> Joined | None:
    if not path.exists():
        return None
    try:
        return open_plan(path)
    except DataError as error:
        _log.warning("%s; building it anew", error)
        return None


# The folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, waiting for it; it ends with the process at the latest."""
    with contextlib.ExitStack() as stack:
        with storage(folder / _LOCK):
            file = stack.enter_context((folder / _LOCK).open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path, max_plans: int) -> None:
    """Delete what killed processes left, and the plans opened longest ago; to be called with the lock held."""
    for path in folder.glob(f"{TEMPORARY}*"):  # some of these end like plans
        discard(path)
    plans = sorted(folder.glob("*.plan"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in plans[max_plans:]:
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where somebody uses it
            path.unlink()
            _log.info("%s: deleted, not used for the longest time", path)
