"""The headers of a tar, read in one pass: its members grouped by stem, and what is wrong with the tar."""

import os
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from pixart_data.records import Reason
from pixart_data.units import MAX_FILE_BYTES, encode_path, is_image, split_extension

_BLOCK = tarfile.BLOCKSIZE
_TAIL_BYTES = 1 << 20
# What tarfile raises on damaged headers; anything else is a bug or the storage.
_HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, EOFError, RecursionError)
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard"}


class Member(NamedTuple):
    """A file in a tar; `offset` is where its content begins, `reason` why it cannot be read."""

    name: str
    extension: str
    is_image: bool
    offset: int
    size_bytes: int
    reason: Reason | None
    detail: str


@dataclass
class Index:
    """The members by encoded stem.

    Attributes:
        last_stem: Of the last member.
        problem: Why what follows the last member cannot be read, or empty.
        unreadable: Why nothing can be read, or empty.
    """

    groups: dict[str, list[Member]] = field(default_factory=dict)
    last_stem: str = ""
    problem: str = ""
    unreadable: str = ""


def index_members(file: BinaryIO, size_bytes: int) -> Index:
    """Read all headers of a tar of `size_bytes`; takes one seek and one small read for each member.

    Raises:
        OSError: If the storage fails; a bad tar raises nothing.
    """
    index = Index()
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8") as tar:
            index.problem = _walk(tar, file, size_bytes, index)
    except _HEADER_ERRORS as error:  # the first header: nothing was read
        packed = _COMPRESSIONS.get(_peek(file, 2, 0))
        what = f"compressed with {packed}; uncompress it" if packed else f"not a tar: {error}"
        index.unreadable = f"{what}; {size_bytes} bytes"
    return index


def _peek(file: BinaryIO, size_bytes: int, offset: int) -> bytes:
    file.seek(offset)
    return file.read(size_bytes)


def _walk(tar: tarfile.TarFile, file: BinaryIO, size_bytes: int, index: Index) -> str:
    """Fill the index; return what is wrong with the archive's end, or an empty string."""
    end = resumed = -1
    while True:
        try:
            member = tar.next()
        except _HEADER_ERRORS as error:
            return f"the header at byte {tar.offset} of {size_bytes} is damaged: {error}"
        tar.members.clear()  # type: ignore[attr-defined]  # or a large tar's headers pile up
        if member is None:
            if resumed == tar.offset:  # what follows the end is no tar
                return ""
            problem, resumed = _ending(file, tar.offset, size_bytes)
            if resumed < 0:
                return problem
            tar.offset = resumed
            continue
        if tar.offset <= end or member.size < 0:
            return f"the header of {member.name} at byte {member.offset} of {size_bytes} is damaged"
        end = tar.offset
        _add(index, member, size_bytes)
        if end > size_bytes:
            return f"the tar ends at byte {size_bytes}, inside of {member.name}, which needs {end}"


def _ending(file: BinaryIO, offset: int, size_bytes: int) -> tuple[str, int]:
    """Return (what is wrong, where another tar may have been appended or -1)."""
    tail = _peek(file, _TAIL_BYTES, offset)
    if len(tail) < _BLOCK:
        return f"the tar ends at byte {size_bytes} without an end mark", -1
    if any(tail[:_BLOCK]):
        return f"the header at byte {offset} of {size_bytes} is damaged", -1
    zeros = len(tail) - len(tail.lstrip(b"\0"))
    if zeros < len(tail):
        return "", offset + zeros // _BLOCK * _BLOCK
    if offset + len(tail) < size_bytes:
        return f"only zeros from byte {offset} of {size_bytes} on: an unfinished download", -1
    return "", -1


def _add(index: Index, info: tarfile.TarInfo, size_bytes: int) -> None:
    stem, extension = split_extension(info.name)
    image = is_image(info.name)
    reason, detail = None, ""
    if not info.isreg() or info.issparse():
        reason, detail = Reason.NOT_A_FILE, f"{info.name}: a tar member of type {info.type!r}, not a plain file"
    elif info.offset_data + info.size > size_bytes:
        present = max(0, size_bytes - info.offset_data)
        reason, detail = Reason.TRUNCATED_TAR, f"{info.name}: {present} of {info.size} bytes; the tar is cut there"
    elif image and info.size > MAX_FILE_BYTES:
        reason, detail = Reason.TOO_LARGE, f"{info.name}: {info.size} bytes"
    if (reason is Reason.NOT_A_FILE and not image) or os.path.basename(info.name).startswith("._"):
        return
    index.last_stem = encode_path(stem)
    member = Member(info.name, extension, image, info.offset_data, info.size, reason, detail)
    index.groups.setdefault(index.last_stem, []).append(member)
