"""Where sources are looked for: the local file system and object stores, asked the same questions."""

import errno
import fnmatch
import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from pixart_data.errors import ConfigError, DataError
from pixart_data.stores import Entry, find_entry, is_url, list_folder, patiently, unreadable, words
from pixart_data.units import fingerprint, is_image

T = TypeVar("T")
_SLOW = "check the network and the store, then run again"


class Place(Protocol):
    """The questions. All raise DataError if the storage fails, and those to a store ConfigError if it refuses."""

    def expand(self, pattern: str) -> list[str]:
        """Return the paths that a pattern matches, in a fixed order; raises ConfigError if there are none."""

    def is_folder(self, path: str) -> bool:
        """Tell a folder that is there."""

    def is_file(self, path: str) -> bool:
        """Tell a file that is there."""

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted, hidden ones left out."""

    def size_bytes(self, path: str) -> int:
        """Return the size of a file."""

    def fingerprint(self, *paths: str) -> str:
        """Return a sha256 that changes when the files do."""

    def walk(self, top: str) -> Iterator[tuple[str, int | str]]:
        """Yield (path relative to `top`, what changes with the content) of images and captions below a folder."""


class Local:
    """Local disks and network mounts."""

    def expand(self, pattern: str) -> list[str]:
        """See `Place`."""
        if os.path.exists(pattern):
            return [pattern]
        matches = sorted({os.path.normpath(path) for path in glob.glob(pattern, recursive=True)})
        if not matches:
            raise ConfigError(f"source.paths: nothing matches {pattern}; check the path, and that the disk is mounted")
        return matches

    def is_folder(self, path: str) -> bool:
        """See `Place`."""
        return os.path.isdir(path)

    def is_file(self, path: str) -> bool:
        """See `Place`."""
        return os.path.isfile(path)

    def names(self, folder: str) -> list[str]:
        """See `Place`."""
        try:
            found = patiently(lambda: os.listdir(folder), folder)
        except OSError as error:
            raise _unlisted(folder, error) from error
        return sorted(name for name in found if not name.startswith("."))

    def size_bytes(self, path: str) -> int:
        """See `Place`."""
        try:
            return patiently(lambda: os.stat(path), path).st_size
        except OSError as error:
            raise unreadable(path, error) from error

    def fingerprint(self, *paths: str) -> str:
        """See `Place`; of sizes, first and last 64 KiB."""
        return fingerprint(*paths)

    def walk(self, top: str) -> Iterator[tuple[str, int | str]]:
        """See `Place`; gives sizes in bytes, -1 for dangling links. Links to folders are followed, each folder once."""
        seen = set()
        folders = [""]
        while folders:
            folder = folders.pop()
            where = os.path.join(top, folder)
            try:
                status = patiently(lambda where=where: os.stat(where), where)  # type: ignore[misc]
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                entries = patiently(lambda where=where: _scan(where), where)  # type: ignore[misc]
                below = [os.path.join(folder, entry.name) for entry in entries if entry.is_dir()]
            except OSError as error:
                raise _unlisted(where, error) from error
            folders += reversed(below)
            for entry in entries:
                if _counts(entry.name) and not entry.is_dir():
                    yield os.path.join(folder, entry.name), _size_bytes(entry)


class Store:
    """Object stores, by URL; each folder is listed once in the life of the object."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, Entry]] = {}

    def expand(self, pattern: str) -> list[str]:
        """See `Place`; `*`, `?`, `[]` and `**` mean what they mean locally."""
        protocol, _, rest = pattern.rstrip("/").partition("://")
        bucket, *parts = rest.split("/")
        root = f"{protocol}://{bucket}"
        matches = sorted(set(self._match(root, parts)))
        if (root in matches or not matches) and self._entries(root) is None:
            raise ConfigError(f"source.paths: there is no bucket {root}; check its name, and AWS_ENDPOINT_URL")
        if not matches:
            raise ConfigError(f"source.paths: nothing matches {pattern}; check the path with `aws s3 ls {root}/`")
        return matches

    def is_folder(self, path: str) -> bool:
        """See `Place`."""
        entry = self._find(path)
        return entry is not None and entry.is_folder

    def is_file(self, path: str) -> bool:
        """See `Place`."""
        entry = self._find(path)
        return entry is not None and not entry.is_folder

    def names(self, folder: str) -> list[str]:
        """See `Place`."""
        return sorted(name for name in self._entries(folder) or {} if not name.startswith("."))

    def size_bytes(self, path: str) -> int:
        """See `Place`."""
        return self._known(path).size_bytes

    def fingerprint(self, *paths: str) -> str:
        """See `Place`; of sizes and ETags, or what the store has in their stead; nothing is read."""
        facts = [f"{entry.size_bytes} {entry.version}" for entry in map(self._known, paths)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def walk(self, top: str) -> Iterator[tuple[str, int | str]]:
        """See `Place`; gives sizes and ETags."""
        folders = [top]
        while folders:
            entries = self._visible(folders.pop())
            folders += reversed([entry.url for entry in entries if entry.is_folder])
            for entry in entries:
                if not entry.is_folder and _counts(entry.url):
                    yield entry.url[len(top) + 1 :], f"{entry.size_bytes} {entry.version}"

    def _match(self, folder: str, parts: list[str]) -> Iterator[str]:
        if not parts:
            yield folder
            return
        head, rest = parts[0], parts[1:]
        if head == "**":
            yield from self._match(folder, rest)
            for entry in self._visible(folder):
                if entry.is_folder:
                    yield from self._match(entry.url, parts)
        elif glob.has_magic(head) and self._find_exact(folder, head) is None:
            for entry in self._visible(folder):
                if fnmatch.fnmatchcase(os.path.basename(entry.url), head) and (entry.is_folder or not rest):
                    yield from self._match(entry.url, rest)
        elif rest or self._find(f"{folder}/{head}") is not None:
            yield from self._match(f"{folder}/{head}", rest)

    def _find_exact(self, folder: str, name: str) -> Entry | None:
        return (self._entries(folder) or {}).get(name)

    def _visible(self, folder: str) -> list[Entry]:
        return [entry for name, entry in (self._entries(folder) or {}).items() if not name.startswith(".")]

    def _entries(self, folder: str) -> dict[str, Entry] | None:
        """Return what is in a folder by name; None if there is no such folder."""
        folder = folder.rstrip("/")
        if folder not in self._folders:
            try:
                found = _asked(lambda: list_folder(folder), folder)
            except FileNotFoundError:
                return None
            self._folders[folder] = {os.path.basename(entry.url): entry for entry in found}
        return self._folders[folder]

    def _find(self, url: str) -> Entry | None:
        folder, name = os.path.split(url.rstrip("/"))
        if folder.endswith(":"):  # a bucket
            return None if self._entries(url) is None else Entry(url, True, 0, "")
        if folder in self._folders:
            return self._folders[folder].get(name)
        try:
            return _asked(lambda: find_entry(url), url)
        except FileNotFoundError:
            return None

    def _known(self, url: str) -> Entry:
        entry = self._find(url)
        if entry is None:
            raise DataError(f"{url}: was listed, and is gone; run the job again")
        return entry


def _asked(question: Callable[[], T], url: str) -> T:
    """Ask a store; who may not ask has a job file or an environment to mend."""
    try:
        return question()
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in (errno.EPERM, errno.EACCES):
            raise ConfigError(
                f"source.paths: {url}: access refused: {words(error)}; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                "and AWS_ENDPOINT_URL (or AWS_PROFILE) to an account that may list and read it"
            ) from error
        raise DataError(f"{url}: cannot be listed: {words(error)}; {_SLOW}") from error


def place_of(path: str, store: Store) -> Place:
    """Return who answers for a path."""
    return store if is_url(path) else Local()


def _unlisted(folder: str, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot be listed: {words(error)}; check its permissions")


def _counts(path: str) -> bool:
    return is_image(path) or path.endswith(".txt")


def _scan(folder: str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as scan:
        return sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _size_bytes(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
