"""Units of work and the samples in them: what the readers of tars, folders and lists share."""

import errno
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pixart_data.records import Reason
from pixart_data.stores import find_entry, is_url, patiently, read_object, read_range, unreadable, words

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"})
MAX_FILE_BYTES = 1 << 30
"""Compressed images above this are rejected unread."""
MAX_CAPTION_BYTES = 1 << 20
"""Of a caption file, this much is read."""

_MISSING = {
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "EINVAL", "EACCES", "EPERM")
}
_EDGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Unit:
    """One unit of work: a tar, or a slice of a large tar, of a folder or of a list.

    Attributes:
        id: Safe as the stem of a file name: `[A-Za-z0-9_%~-]`.
        path: A local path, or the URL of an object store.
        name: The first component of every key; the id without the number of the slice.
        start: First file of a folder's sorted images, or first row of a list, in this slice.
        stop: One past the last; 0 and -1 for tars.
        num_rows: Rows that `read_samples` will yield; 0 for tars, see `count_rows`.
        fingerprint: Changes when the content does, and when the slice is cut differently.
        sidecar: For tars: the img2dataset Parquet beside it, or empty.
        files: For folders: the slice's images relative to `path`.
        file_before: For folders: the image before the slice, which may share the first one's stem.
        first_line: For lists: the number, from 1, of the line or row that the slice begins with.
        byte_range: For JSON and JSONL lists: where the slice lies in the file. For slices of tars: where the images
            begin that belong to it.
        repeats: For lists: (index in the slice, n) of rows whose key comes up for the n-th time.
        size_bytes: For slices of tars: of the whole tar; -1 for what is not such a slice.
    """

    id: str
    kind: Literal["tar", "folder", "list"]
    path: str
    start: int
    stop: int
    num_rows: int
    fingerprint: str
    name: str
    sidecar: str = ""
    files: tuple[str, ...] = ()
    file_before: str = ""
    first_line: int = 1
    byte_range: tuple[int, int] = (0, 0)
    repeats: tuple[tuple[int, int], ...] = ()
    size_bytes: int = -1


@dataclass(frozen=True)
class Sample:
    """An image and the words that came with it, or the reason why there is none.

    Attributes:
        key: Unique within a job; only `[A-Za-z0-9_/%~-]`.
        data: Compressed image bytes; None on rejected samples and where images were not asked for.
        caption: As found, without white space around it; None if there is none.
    """

    key: str
    data: bytes | None
    caption: str | None
    error: Reason | None = None
    detail: str = ""


def rejected(key: str, reason: Reason, detail: str, caption: str | None = None) -> Sample:
    """Return a rejected sample whose detail is safe to store as UTF-8."""
    return Sample(key, None, caption, reason, storable(detail))


def storable(text: str) -> str:
    """Replace lone surrogates, which JSON and odd file names can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def caption_text(data: bytes) -> str:
    """Read the content of a caption file."""
    return data.decode("utf-8-sig", "replace").strip()


def encode_name(text: str, max_length: int = 160) -> str:
    """Percent-encode all but `[A-Za-z0-9_-]`; what comes out longer than `max_length` is cut and ends in a digest."""
    raw = text.encode("utf-8", "surrogatepass")
    encoded = re.sub(rb"[^A-Za-z0-9_-]", lambda match: b"%%%02X" % match[0][0], raw).decode()
    if len(encoded) <= max_length:
        return encoded
    return f"{encoded[: max_length - 17]}-{hashlib.sha256(raw).hexdigest()[:16]}"


def encode_path(path: str) -> str:
    """Percent-encode the components of a path; no dot, no empty and no absolute component survives."""
    return "/".join(encode_name(part) for part in path.split("/") if part not in ("", ".")) or "_"


def split_extension(path: str) -> tuple[str, str]:
    """Split off the extension, without its dot and in the case it has."""
    stem, extension = os.path.splitext(path)
    return stem, extension[1:]


def is_image(path: str) -> bool:
    """Tell by the extension; `._x.jpg`, which macOS leaves beside `x.jpg`, is none."""
    return split_extension(path)[1].lower() in IMAGE_EXTENSIONS and not os.path.basename(path).startswith("._")


def fingerprint(*paths: str) -> str:
    """Return a sha256 over the sizes, first and last 64 KiB of files.

    Raises:
        DataError: If one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(patiently(partial(_edges, path), path))
        except OSError as error:
            raise unreadable(path, error) from error
    return digest.hexdigest()


def _edges(path: str) -> bytes:
    with open(path, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        first = file.read(_EDGE_BYTES)
        file.seek(max(0, size_bytes - _EDGE_BYTES))
        return b"%d;" % size_bytes + first + file.read(_EDGE_BYTES)


def is_missing(error: OSError) -> bool:
    """Tell a file that cannot be had, which is a fact about the data, from storage that fails, which may pass.

    An object store that refuses access is no such fact: credentials expire in the middle of a job.
    """
    return error.errno in _MISSING or isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)


def read_caption(path: str) -> str | None:
    """Read a caption file, local or on an object store; None if there is none.

    Raises:
        DataError: If the storage fails.
    """
    try:
        if is_url(path):
            return caption_text(read_object(path, MAX_CAPTION_BYTES))
        return caption_text(patiently(partial(_first_bytes, path), path))
    except OSError as error:
        if not is_missing(error) or (is_url(path) and isinstance(error, PermissionError)):
            raise unreadable(path, error) from error
        return None


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_CAPTION_BYTES)


def load_sample(key: str, path: str, caption: str | None, with_images: bool) -> Sample:
    """Read an image file, local or on an object store, into a sample; a missing one is rejected.

    Raises:
        DataError: If the storage fails.
    """
    if not with_images:
        return Sample(key, None, caption)
    try:
        return _load_object(key, path, caption) if is_url(path) else _load_file(key, path, caption)
    except OSError as error:
        if not is_missing(error) or (is_url(path) and isinstance(error, PermissionError)):
            raise unreadable(path, error) from error
        return rejected(key, Reason.MISSING_FILE, f"{path}: {words(error)}", caption)
    except ValueError as error:  # a NUL or a lone surrogate in the path
        return rejected(key, Reason.MISSING_FILE, f"{path!r}: {error}", caption)


def _load_file(key: str, path: str, caption: str | None) -> Sample:
    def read() -> Sample:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return rejected(key, Reason.NOT_A_FILE, f"{path}: not a regular file", caption)
        if status.st_size > MAX_FILE_BYTES:
            return rejected(key, Reason.TOO_LARGE, f"{path}: {status.st_size} bytes", caption)
        with open(path, "rb") as file:
            return Sample(key, file.read(), caption)

    return patiently(read, path)


def _load_object(key: str, url: str, caption: str | None) -> Sample:
    entry = find_entry(url)
    if entry.is_folder:
        return rejected(key, Reason.NOT_A_FILE, f"{url}: not a regular file", caption)
    if entry.size_bytes > MAX_FILE_BYTES:
        return rejected(key, Reason.TOO_LARGE, f"{url}: {entry.size_bytes} bytes", caption)
    return Sample(key, read_range(url, 0, entry.size_bytes), caption)
