"""Tars of images: SA-1B's (image and JSON), img2dataset's (image, JSON, TXT, a Parquet beside the tar) and their like.

One pass over the headers groups the members by their path without extension; images are then read by offset, one at
a time, and nothing is ever extracted. A tar that is cut or damaged gives what can still be read, and rows that say
what cannot. The slices of a large tar each read all headers, so that they agree on the rows, and then only their own
images: the rows of the slices, one after another, are those of the tar.
"""

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.errors import DataError
from pixart_data.headers import Index, Member, index_members
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.stores import ObjectFile, is_url, open_file, patiently, scratch_copy, unreadable
from pixart_data.units import (
    MAX_CAPTION_BYTES,
    MAX_FILE_BYTES,
    Sample,
    Unit,
    caption_text,
    encode_name,
    encode_path,
    rejected,
    storable,
)

_MAX_JSON_BYTES = 1 << 20  # SA-1B's masks are larger, and hold no caption
_LAST = 1 << 63
_HEADER_BUFFER_BYTES = 1024  # a header, and not what follows it


@dataclass(frozen=True)
class _Sidecar:
    """What img2dataset wrote beside the tar: captions of the images it downloaded, by encoded stem."""

    captions: dict[str, str | None]


class _Row(NamedTuple):
    position: int
    key: str
    stem: str
    image: Member | None = None
    reason: Reason | None = None
    detail: str = ""
    caption: Member | None = None
    metadata: Member | None = None


class _Tar(Protocol):
    """An open tar, local or not."""

    size_bytes: int

    def index(self) -> Index:
        """Read the headers."""

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        """Read a part of the tar; less comes back where it ends before."""


def cut_tar(unit: Unit, size_bytes: int, bytes_per_unit: int) -> list[Unit]:
    """Cut a unit that is a whole tar into slices of equal size; up to 1.5 times `bytes_per_unit` it stays whole.

    Nothing is read: a sample belongs to the slice in which its image begins, as the readers of the slices will find.
    """
    if 2 * size_bytes <= 3 * bytes_per_unit:
        return [unit]
    count = -(-size_bytes // bytes_per_unit)
    slices = []
    for number in range(count):
        begin, end = size_bytes * number // count, size_bytes * (number + 1) // count
        cut = f"{unit.fingerprint} {begin} {end}"
        slices.append(
            replace(
                unit,
                id=f"{unit.name}~{number:05d}",  # no encoded name holds a `~`
                byte_range=(begin, end if number < count - 1 else _LAST + 1),
                size_bytes=size_bytes,
                fingerprint=hashlib.sha256(cut.encode()).hexdigest(),
            )
        )
    return slices


def count_tar_rows(unit: Unit) -> int:
    """Return how many samples `read_tar` will yield; reads the headers only.

    Raises:
        DataError: If the storage fails.
    """
    with _opened(unit, with_images=False) as tar:
        return len(_rows(unit, tar.index(), _read_sidecar(unit)))


def read_tar(unit: Unit, source: Source, with_images: bool, keys: Set[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a tar, or of a slice of one, in the order of their images.

    A tar on an object store is first copied to the scratch disk; where no images are wanted, its headers and captions
    are read in place.

    Args:
        keys: Only the samples with these.

    Raises:
        DataError: If the storage fails, or a tar that is cut into slices is no longer of the same size; a bad tar
            gives rejected samples.
    """
    with _opened(unit, with_images) as tar:
        index = tar.index()
        sidecar = _read_sidecar(unit)
        reads_json = _reads_json(tar, index, source)
        rows = [row for row in _rows(unit, index, sidecar) if keys is None or row.key in keys]
        del index  # of a large tar's members, a slice needs few
        for row in rows:
            if row.image is None or row.reason:
                yield rejected(row.key, row.reason or Reason.NO_IMAGE, row.detail)
                continue
            caption = _caption(tar, row, reads_json)
            if caption is None and sidecar:
                caption = sidecar.captions.get(row.stem)
            yield _load(tar, row.key, row.image, caption, with_images)


def _load(tar: _Tar, key: str, image: Member, caption: str | None, with_images: bool) -> Sample:
    if not with_images:
        return Sample(key, None, caption)
    data = _read(tar, image)
    if len(data) < image.size_bytes:
        detail = f"{image.name}: {len(data)} of {image.size_bytes} bytes; the tar shrank while it was read"
        return rejected(key, Reason.TRUNCATED_TAR, detail, caption)
    return Sample(key, data, caption)


def _read(tar: _Tar, member: Member, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    return tar.read_at(member.offset, min(member.size_bytes, limit_bytes))


# Files


@contextlib.contextmanager
def _opened(unit: Unit, with_images: bool) -> Iterator[_Tar]:
    with contextlib.ExitStack() as stack:
        try:
            if is_url(unit.path) and not with_images:
                tar: _Tar = _RemoteTar(unit.path)
            else:
                path = stack.enter_context(scratch_copy(unit.path)) if is_url(unit.path) else unit.path
                tar = _LocalTar(path)
                stack.callback(tar.close)
            if unit.size_bytes not in (-1, tar.size_bytes):
                expected = f"expected {unit.size_bytes} bytes, as when it was cut into slices, found {tar.size_bytes}"
                raise DataError(f"{unit.path}: {expected}; run the job again")
            yield tar
        except OSError as error:
            raise unreadable(unit.path, error) from error


class _LocalTar:
    """A tar on a disk or a network mount; a handle that goes stale is opened anew."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = patiently(partial(os.open, path, os.O_RDONLY), path)
        self._facts = self._look()
        self.size_bytes = self._facts[0]

    def close(self) -> None:
        os.close(self._descriptor)

    def index(self) -> Index:
        def read() -> Index:
            with open(self._path, "rb", buffering=_HEADER_BUFFER_BYTES) as file:
                return index_members(file, self.size_bytes)

        return patiently(read, self._path)

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes and (part := self._read_some(offset + len(data), size_bytes - len(data))):
            data = data + part if data else part
        return data

    def _read_some(self, offset: int, size_bytes: int) -> bytes:
        def read() -> bytes:
            try:
                return os.pread(self._descriptor, size_bytes, offset)
            except OSError:
                self._reopen()
                raise

        return patiently(read, self._path)

    def _reopen(self) -> None:
        fresh = os.open(self._path, os.O_RDONLY)
        os.close(self._descriptor)
        self._descriptor = fresh
        if self._look() != self._facts:
            raise DataError(f"{self._path}: it changed while it was read; run the job again when it is finished")

    def _look(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


class _RemoteTar:
    """A tar on an object store, read in place: for headers and captions."""

    def __init__(self, url: str) -> None:
        raw = ObjectFile(url)
        self.size_bytes = raw.size_bytes
        self._file = io.BufferedReader(raw, _HEADER_BUFFER_BYTES)

    def index(self) -> Index:
        return index_members(self._file, self.size_bytes)

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size_bytes)


# Rows


def _rows(unit: Unit, index: Index, sidecar: _Sidecar | None) -> list[_Row]:
    """Return one row for each sample of the unit, in order, with keys unique in the whole tar."""
    rows = [row for stem, members in index.groups.items() for row in _group_rows(stem, members, index)]
    rows.sort(key=lambda row: row.position)
    if index.unreadable:
        rows = [_Row(0, "unreadable", "", reason=Reason.UNREADABLE_TAR, detail=index.unreadable)]
    else:
        rows += _lost_rows(index, sidecar)
    if index.problem and not sidecar and all(row.reason is not Reason.TRUNCATED_TAR for row in rows):
        detail = f"{index.problem}; samples that followed are missing"
        rows.append(_Row(_LAST, "truncated", "", reason=Reason.TRUNCATED_TAR, detail=detail))
    seen: Counter[str] = Counter()
    for i, row in enumerate(rows):
        seen[row.key] += 1
        again = f"~{seen[row.key]}" if seen[row.key] > 1 else ""
        rows[i] = row._replace(key=f"{unit.name}/{row.key}{again}")
    begin, end = unit.byte_range if unit.size_bytes >= 0 else (0, _LAST + 1)
    return [row for row in rows if begin <= row.position < end]


def _group_rows(stem: str, members: list[Member], index: Index) -> Iterator[_Row]:
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


def _lost_rows(index: Index, sidecar: _Sidecar | None) -> Iterator[_Row]:
    reason = Reason.TRUNCATED_TAR if index.problem else Reason.NO_IMAGE
    detail = "the .parquet beside the tar lists it as downloaded, the tar does not hold it"
    for stem in sidecar.captions if sidecar else ():
        if stem not in index.groups:
            yield _Row(_LAST, stem, stem, reason=reason, detail=f"{detail}; {index.problem}".removesuffix("; "))


# Captions


def _reads_json(tar: _Tar, index: Index, source: Source) -> bool:
    """Decide whether the JSON members can hold captions; `auto` looks at the first of them."""
    if source.layout != "auto":
        return source.layout == "img2dataset"
    members = (member for group in index.groups.values() for member in group if member.extension == "json")
    first = next((member for member in members if not member.reason), None)
    if first is None or first.size_bytes > _MAX_JSON_BYTES:
        return False
    content = _parse(_read(tar, first))
    return "caption" in content or "annotations" not in content


def _caption(tar: _Tar, row: _Row, reads_json: bool) -> str | None:
    if row.caption:
        return caption_text(_read(tar, row.caption, MAX_CAPTION_BYTES))
    if not (reads_json and row.metadata and row.metadata.size_bytes <= _MAX_JSON_BYTES):
        return None
    caption = _parse(_read(tar, row.metadata)).get("caption")
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
        rows = patiently(partial(_sidecar_rows, unit.sidecar), unit.sidecar)
    except pa.ArrowException:
        return None
    except OSError as error:
        if error.errno is None and not isinstance(error, PermissionError | FileNotFoundError):
            return None  # pyarrow says of a damaged file, too, that it cannot be read
        raise unreadable(unit.sidecar, error) from error
    if rows is None:
        return None
    captions = {}
    for row in rows:
        if row["status"] == "success" and isinstance(row["key"], str):
            text = row.get("caption")
            captions[encode_path(row["key"])] = text.strip() if isinstance(text, str) else None
    return _Sidecar(captions)


def _sidecar_rows(path: str) -> list[dict[str, Any]] | None:
    with open_file(path) as file, pq.ParquetFile(file) as table:
        if not {"key", "status"} <= set(table.schema_arrow.names):
            return None
        columns = [name for name in ("key", "status", "caption") if name in table.schema_arrow.names]
        rows: list[dict[str, Any]] = table.read(columns=columns).to_pylist()
        return rows
