"""Places that outputs are written to and sources are read from: local folders, network mounts, object stores.

Every operation on a place goes through `retries.retrying`, which waits out what may pass. A local file becomes visible
by a rename, an object by the end of its upload: neither is ever seen half written.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from pixart_data.errors import ConfigError, DataError
from pixart_data.processes import is_alive, process_name
from pixart_data.retries import retrying, storage

T = TypeVar("T")

TEMPORARY = ".tmp-"
"""Prefix of files that are not finished."""

# Without these a listing made before our own writes would be trusted, a store that hangs waited for for ever, and
# retries made where nobody counts them.
_STORE_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    }
}


def location(url: str) -> Path:
    """Return a path for a local folder or for a URL such as `s3://bucket/prefix`.

    What comes back for a URL has the methods of `pathlib.Path` that the toolkit uses, and is typed as one. Credentials
    and the endpoint of an S3-compatible store come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` ...).

    Raises:
        ConfigError: If the package that opens the URL is not installed.
    """
    if "://" not in url:
        return Path(url)
    protocol = url.split("://")[0]
    try:
        from upath import UPath

        path = UPath(url.rstrip("/"), **_STORE_OPTIONS.get(protocol, {}))
        _ = path.fs  # imports the protocol's package
    except ImportError as error:
        remedy = "pip install 'pixart-toolkit[s3]'" if protocol == "s3" else f"install fsspec's package for {protocol}"
        raise ConfigError(f"{url}: a package is missing ({error}); {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: no storage is known by this name ({error}); use a folder or s3://...") from error
    return cast(Path, path)


def is_remote(path: Any) -> bool:
    """Tell an object store's path from one that the operating system opens."""
    return not isinstance(path, Path)


# Reading


def read_bytes(path: Path) -> bytes:
    """Return a file's content; FileNotFoundError if there is none."""
    return retrying(path.read_bytes, path, "read")


def read_many(paths: list[Path]) -> list[bytes]:
    """Return the contents of small files; those of an object store are read at the same time."""
    if not paths or not is_remote(paths[0]):
        return [read_bytes(path) for path in paths]
    store: Any = cast(Any, paths[0]).fs
    found = store.cat([cast(Any, path).path for path in paths], on_error="return")
    found = found if isinstance(found, dict) else {cast(Any, paths[0]).path: found}
    contents = (found.get(cast(Any, path).path) for path in paths)
    return [  # those that failed, one by one
        content if isinstance(content, bytes) else read_bytes(path)
        for path, content in zip(paths, contents, strict=True)
    ]


def list_files(directory: Path) -> list[Path]:
    """Return the files directly in a folder, in the order of their names; none if there is no such folder.

    Raises:
        JobError: If there is one that cannot be read: taken for empty, all of its work would be done again.
    """
    if not is_remote(directory):
        try:
            return [directory / name for name in retrying(lambda: _local_names(directory), directory, "read")]
        except (FileNotFoundError, NotADirectoryError):
            return []
    store: Any = cast(Any, directory).fs
    try:
        entries = retrying(lambda: store.ls(cast(Any, directory).path, detail=True, refresh=True), directory, "read")
    except FileNotFoundError:
        return []
    names = sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")
    return [directory / name for name in names if name]


def _local_names(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:  # Path.glob takes a folder that may not be read for an empty one
        return sorted(entry.name for entry in entries if entry.is_file())


def exists(path: Path) -> bool:
    """Tell whether a file is there.

    Raises:
        JobError: If the storage does not say: taken for missing, what is there would be left out or done again.
    """
    if not is_remote(path):
        return retrying(path.is_file, path, "read")
    try:
        return bool(_info(path)["type"] == "file")  # fsspec's `isfile` takes a store that does not answer for a no
    except FileNotFoundError:
        return False


def matching(root: Path, pattern: str) -> list[Path]:
    """Return what matches a pattern of `glob` below a folder, sorted; raises ConfigError if nothing is at `root`."""
    found = retrying(lambda: sorted(root.glob(pattern)), root, "read")
    if not found:
        require_there(root)
    return found


def require_there(path: Path, setting: str = "") -> None:
    """Raise ConfigError, after the `setting` that names it, if there is neither a file nor a folder."""
    if not retrying(path.exists, path, "read"):
        raise ConfigError(f"{setting and f'{setting}: '}{path}: no such file or folder; check the path")


def remote_fingerprint(path: Path) -> str:
    """Return what changes when an object does: its size and its tag, or when it was last written."""
    info = _info(path)
    return str([info.get("size"), info.get("ETag") or info.get("etag") or str(info.get("LastModified"))])


def _info(path: Path) -> dict[str, Any]:
    store: Any = cast(Any, path).fs
    found: dict[str, Any] = retrying(lambda: store.info(cast(Any, path).path), path, "read")
    return found


def size_bytes(path: Path) -> int:
    """Return the size of a file that is there."""
    return int(retrying(path.stat, path, "read").st_size)


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Give a path that the operating system opens: `path` itself, or a copy of an object for as long as it is needed.

    Raises:
        FileNotFoundError: If there is none.
        JobError: If the copy cannot be made.
    """
    if not is_remote(path):
        yield path
        return
    copy = scratch_file(path.name)
    try:
        retrying(lambda: cast(Any, path).fs.get_file(cast(Any, path).path, str(copy)), path, "read")
        yield copy
    finally:
        copy.unlink(missing_ok=True)


# Writing


def make_dir(path: Path) -> Path:
    """Create a directory with its parents and return it; raises JobError where that is impossible."""
    if not is_remote(path):
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old or the new content, never a part."""
    with storage(path):
        if is_remote(path):
            retrying(lambda: path.write_bytes(data), path)
            return
        make_dir(path.parent)
        retrying(lambda: _write_local(path, data, os.replace), path)


def write_new(path: Path, data: bytes) -> bool:
    """Write a small file only if there is none, which one of several writers achieves; return whether this one did."""
    if is_remote(path):
        store: Any = cast(Any, path).fs
        with storage(path):
            try:
                retrying(lambda: _put_if_absent(store, cast(Any, path).path, data), path)
            except FileExistsError:
                return read_bytes(path) == data  # the answer to our own first attempt may have been lost
        return True
    make_dir(path.parent)
    with storage(path):
        try:
            retrying(lambda: _write_local(path, data, _link), path)
        except FileExistsError:
            return False
    return True


def _link(name: str, path: Path) -> None:
    """Give a file its final name if nothing has it; NFS keeps this promise, too.

    Where there are no hard links, the file is copied to its name: one writer wins, but a kill leaves a part of it.
    """
    try:
        os.link(name, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with Path(name).open("rb") as source, path.open("xb") as target:
            try:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
            except BaseException:
                path.unlink(missing_ok=True)  # it is ours, and a part would stand in everybody's way
                raise


def _put_if_absent(store: Any, name: str, data: bytes) -> None:
    try:
        store.pipe_file(name, data, mode="create")
    except OSError as error:
        if error.errno == errno.EINVAL and "condition" in str(error).lower():  # S3 answers 412
            raise FileExistsError(name) from error
        raise


def _write_local(path: Path, data: bytes, put: Callable[[str, Path], None]) -> None:
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        try:
            put(name, path)
        except FileNotFoundError as error:
            if Path(name).exists():
                raise
            raise OSError(errno.EAGAIN, "its temporary file was swept away") from error  # by a run that took over
        sync_dir(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)  # gone after a rename


def replace_file(staged: Path, path: Path) -> None:
    """Put a staged file in its place, flushed, replacing what is there; the staged one is gone then."""
    if is_remote(path):
        size_bytes = staged.stat().st_size

        def upload() -> None:
            store: Any = cast(Any, path).fs
            store.put_file(str(staged), cast(Any, path).path)
            if (found := store.info(cast(Any, path).path)["size"]) != size_bytes:
                raise OSError(errno.EIO, f"uploaded {size_bytes} bytes, found {found}")

        with storage(path):
            retrying(upload, path)
        staged.unlink()
        return

    def rename() -> None:
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
        sync_dir(path.parent)

    with storage(path):
        retrying(rename, path)


def delete(paths: Iterable[Path]) -> int:
    """Delete files and return how many; those that are gone already do not matter."""
    count = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            retrying(path.unlink, path)
            count += 1
    return count


def sync_dir(directory: Path) -> None:
    """Flush a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Scratch


def staging_path(directory: Path, name: str) -> Path:
    """Return a fresh local file for what `replace_file` will put into `directory`: in it, or in the scratch folder."""
    if is_remote(directory):
        return scratch_file(name)
    make_dir(directory)
    return _fresh(directory, name)


@contextlib.contextmanager
def staging(directory: Path, name: str) -> Iterator[Path]:
    """Give a `staging_path` that does not stay behind if it is not put in its place."""
    path = staging_path(directory, name)
    try:
        yield path
    finally:
        discard(path)


def discard(staged: Path) -> None:
    """Delete a staged file, if it is there still; a failure to do so hides no other."""
    with contextlib.suppress(OSError):
        staged.unlink()


def scratch_file(name: str) -> Path:
    """Return a fresh file in this process's scratch folder, below TMPDIR.

    Folders of processes that are no more are deleted on the way: a killed worker cannot clean up after itself.
    """
    parent = Path(tempfile.gettempdir()) / f"pixart-{os.getuid()}"
    folder = parent / process_name()
    if not folder.is_dir():
        make_dir(folder)
        for other in parent.iterdir():
            if not is_alive(other.name):
                shutil.rmtree(other, ignore_errors=True)
    return _fresh(folder, name)


def _fresh(directory: Path, name: str) -> Path:
    with storage(directory):
        handle, path = tempfile.mkstemp(prefix=TEMPORARY, suffix=f"-{name[-80:]}", dir=directory)
        os.close(handle)
        os.chmod(path, 0o644)
    return Path(path)


def require_local(path: Path, why: str) -> Path:
    """Return `path`; raises DataError where it is an object store's, saying what to do."""
    if is_remote(path):
        raise DataError(f"{path}: {why}; copy it to a local disk first, e.g. with `aws s3 sync`")
    return path
