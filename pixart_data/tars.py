"""Tars of images: SA-1B's (image and JSON), img2dataset's (image, JSON, TXT, a Parquet beside the tar) and their like.

One pass over the headers groups the members by their path without extension; images are then read by offset, one at
a time, and nothing is ever extracted. A tar that is cut or damaged gives what can still be read, and rows that say
what cannot.
"""

import contextlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.errors import DataError
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.units import (
    MAX_CAPTION_BYTES,
    MAX_FILE_BYTES,
    Sample,
    Unit,
    caption_text,
    encode_name,
    encode_path,
    is_image,
    rejected,
    split_extension,
    storable,
)

_BLOCK = tarfile.BLOCKSIZE
_TAIL_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 20  # SA-1B's masks are larger, and hold no caption
_LAST = 1 << 63
# What tarfile raises on damaged headers; anything else is a bug or the storage.
_HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, EOFError, RecursionError)
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard"}


class _Member(NamedTuple):
    name: str
    extension: str
    is_image: bool
    offset: int
    size_bytes: int
    reason: Reason | None
    detail: str


@dataclass
class _Index:
    """The members by encoded stem; `problem` tells why what follows the last one cannot be read."""

    groups: dict[str, list[_Member]] = field(default_factory=dict)
    last_stem: str = ""
    problem: str = ""
    unreadable: str = ""


@dataclass(frozen=True)
class _Sidecar:
    """What img2dataset wrote beside the tar: captions of the images it downloaded, by encoded stem."""

    captions: dict[str, str | None]


class _Row(NamedTuple):
    position: int
    key: str
    stem: str
    image: _Member | None = None
    reason: Reason | None = None
    detail: str = ""
    caption: _Member | None = None
    metadata: _Member | None = None


def count_tar_rows(unit: Unit) -> int:
    """Return how many samples `read_tar` will yield; reads the headers only."""
    with _opened(unit.path) as descriptor:
        return len(_rows(unit, _index(descriptor), _read_sidecar(unit)))


def read_tar(unit: Unit, source: Source, with_images: bool) -> Iterator[Sample]:
    """Yield the samples of a tar in the order of their images.

    Raises:
        DataError: If the storage fails; a bad tar gives rejected samples.
    """
    with _opened(unit.path) as descriptor:
        index = _index(descriptor)
        sidecar = _read_sidecar(unit)
        reads_json = _reads_json(descriptor, index, source)
        for row in _rows(unit, index, sidecar):
            if row.image is None or row.reason:
                yield rejected(row.key, row.reason or Reason.NO_IMAGE, row.detail)
                continue
            caption = _caption(descriptor, row, reads_json)
            if caption is None and sidecar:
                caption = sidecar.captions.get(row.stem)
            yield _load(descriptor, row.key, row.image, caption, with_images)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY)
        yield descriptor
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the storage, then run again") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _load(descriptor: int, key: str, image: _Member, caption: str | None, with_images: bool) -> Sample:
    if not with_images:
        return Sample(key, None, caption)
    data = _read(descriptor, image)
    if len(data) < image.size_bytes:
        detail = f"{image.name}: {len(data)} of {image.size_bytes} bytes; the tar shrank while it was read"
        return rejected(key, Reason.TRUNCATED_TAR, detail, caption)
    return Sample(key, data, caption)


def _read(descriptor: int, member: _Member, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    wanted = min(member.size_bytes, limit_bytes)
    data = b""
    while len(data) < wanted and (part := os.pread(descriptor, wanted - len(data), member.offset + len(data))):
        data = data + part if data else part
    return data


# Headers


def _index(descriptor: int) -> _Index:
    index = _Index()
    size_bytes = os.fstat(descriptor).st_size
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        try:
            with tarfile.TarFile(fileobj=file, encoding="utf-8") as tar:
                index.problem = _walk(tar, descriptor, size_bytes, index)
        except _HEADER_ERRORS as error:  # the first header: nothing was read
            packed = _COMPRESSIONS.get(os.pread(descriptor, 2, 0))
            what = f"compressed with {packed}; uncompress it" if packed else f"not a tar: {error}"
            index.unreadable = f"{what}; {size_bytes} bytes"
    return index


def _walk(tar: tarfile.TarFile, descriptor: int, size_bytes: int, index: _Index) -> str:
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
            problem, resumed = _ending(descriptor, tar.offset, size_bytes)
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


def _ending(descriptor: int, offset: int, size_bytes: int) -> tuple[str, int]:
    """Return (what is wrong, where another tar may have been appended or -1)."""
    tail = os.pread(descriptor, _TAIL_BYTES, offset)
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


def _add(index: _Index, info: tarfile.TarInfo, size_bytes: int) -> None:
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
    member = _Member(info.name, extension, image, info.offset_data, info.size, reason, detail)
    index.groups.setdefault(index.last_stem, []).append(member)


# Rows


def _rows(unit: Unit, index: _Index, sidecar: _Sidecar | None) -> list[_Row]:
    """Return one row for each sample, in order, with keys made unique."""
    if index.unreadable:
        return [_Row(0, f"{unit.name}/unreadable", "", reason=Reason.UNREADABLE_TAR, detail=index.unreadable)]
    rows = [row for stem, members in index.groups.items() for row in _group_rows(stem, members, index)]
    rows.sort(key=lambda row: row.position)
    rows += _lost_rows(index, sidecar)
    if index.problem and not sidecar and all(row.reason is not Reason.TRUNCATED_TAR for row in rows):
        detail = f"{index.problem}; samples that followed are missing"
        rows.append(_Row(_LAST, "truncated", "", reason=Reason.TRUNCATED_TAR, detail=detail))
    seen: Counter[str] = Counter()
    for i, row in enumerate(rows):
        seen[row.key] += 1
        again = f"~{seen[row.key]}" if seen[row.key] > 1 else ""
        rows[i] = row._replace(key=f"{unit.name}/{row.key}{again}")
    return rows


def _group_rows(stem: str, members: list[_Member], index: _Index) -> Iterator[_Row]:
    images = [member for member in members if member.is_image]
    others = [member for member in members if not member.is_image]
    spoilt = next((member for member in others if member.reason), None)
    if not images:
        names = ", ".join(member.name for member in members[:4])
        cut = bool(spoilt or (index.problem and stem == index.last_stem))
        reason = Reason.TRUNCATED_TAR if cut else Reason.NO_IMAGE
        detail = f"no image beside {names}" + (f"; {index.problem}" if cut else "")
        yield _Row(members[0].offset, stem, stem, reason=reason, detail=detail)
    captions = [member for member in others if member.extension == "txt"]
    metadata = [member for member in others if member.extension == "json"]
    for i, image in enumerate(images):
        suffix = "" if image.extension == images[0].extension else f"~{encode_name(image.extension)}"
        bad = image if image.reason else spoilt
        yield _Row(
            position=image.offset,
            key=stem + suffix,
            stem=stem,
            image=image,
            reason=bad.reason if bad else None,
            detail=bad.detail if bad else "",
            caption=captions[min(i, len(captions) - 1)] if captions else None,
            metadata=metadata[min(i, len(metadata) - 1)] if metadata else None,
        )


def _lost_rows(index: _Index, sidecar: _Sidecar | None) -> Iterator[_Row]:
    reason = Reason.TRUNCATED_TAR if index.problem else Reason.NO_IMAGE
    detail = "the .parquet beside the tar lists it as downloaded, the tar does not hold it"
    for stem in sidecar.captions if sidecar else ():
        if stem not in index.groups:
            yield _Row(_LAST, stem, stem, reason=reason, detail=f"{detail}; {index.problem}".removesuffix("; "))


# Captions


def _reads_json(descriptor: int, index: _Index, source: Source) -> bool:
    """Decide whether the JSON members can hold captions; `auto` looks at the first of them."""
    if source.layout != "auto":
        return source.layout == "img2dataset"
    members = (member for group in index.groups.values() for member in group if member.extension == "json")
    first = next((member for member in members if not member.reason), None)
    if first is None or first.size_bytes > _MAX_JSON_BYTES:
        return False
    content = _parse(_read(descriptor, first))
    return "caption" in content or "annotations" not in content


def _caption(descriptor: int, row: _Row, reads_json: bool) -> str | None:
    if row.caption:
        return caption_text(_read(descriptor, row.caption, MAX_CAPTION_BYTES))
    if not (reads_json and row.metadata and row.metadata.size_bytes <= _MAX_JSON_BYTES):
        return None
    caption = _parse(_read(descriptor, row.metadata)).get("caption")
    return storable(caption).strip() if isinstance(caption, str) else None


def _parse(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_sidecar(unit: Unit) -> _Sidecar | None:
    """Read the rows that img2dataset downloaded; None where the file is not what img2dataset writes."""
    if not unit.sidecar:
        return None
    try:
        with pq.ParquetFile(unit.sidecar) as file:
            if not {"key", "status"} <= set(file.schema_arrow.names):
                return None
            columns = [name for name in ("key", "status", "caption") if name in file.schema_arrow.names]
            rows = file.read(columns=columns).to_pylist()
    except pa.ArrowException:
        return None
    except OSError as error:
        if error.errno is None:  # pyarrow says of a damaged file, too, that it cannot be read
            return None
        raise DataError(f"{unit.sidecar}: cannot be read: {error}; check the storage, then run again") from error
    captions = {}
    for row in rows:
        if row["status"] == "success" and isinstance(row["key"], str):
            text = row.get("caption")
            captions[encode_path(row["key"])] = text.strip() if isinstance(text, str) else None
    return _Sidecar(captions)
