"""A folder of bounded size for what was fetched from elsewhere; what was used longest ago makes room.

Several processes may share the folder: its size is accounted for under a lock, which the kernel lets go of when a
process dies. A file's time of modification is when it was last used, so that a later run knows too.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pixart_data.storage import TEMPORARY

_ACCOUNT = "account"
_KEPT = 0.9  # of the bound, after room was made: a folder is not walked for each file


class Cache:
    """Files by name, of at most `max_bytes` together.

    A disk that fails or is full does no harm: what cannot be kept is fetched again.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def get(self, name: str) -> bytes | None:
        """Return a file's content, or None if it is not here."""
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> bool:
        """Keep a file, making room for it first; return whether it is kept."""
        if len(data) > self.max_bytes * _KEPT:
            return False
        path = self.folder / name
        try:
            with self._account() as account:
                if path.exists():
                    return True
                text = account.read_text()
                used_bytes = int(text) if text.isdecimal() else self.size_bytes()
                if used_bytes + len(data) > self.max_bytes:
                    used_bytes = self._make_room(len(data))
                _write(path, data)
                account.write_text(str(used_bytes + len(data)))
        except OSError:
            return False
        return True

    def drop(self, name: str) -> None:
        """Delete a file; the account learns of it when room is made next."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def size_bytes(self) -> int:
        """Return what the files take, by looking at them."""
        return sum(size for _, size, _ in self._files())

    @contextlib.contextmanager
    def _account(self) -> Iterator[Path]:
        account = self.folder / _ACCOUNT
        self.folder.mkdir(parents=True, exist_ok=True)
        with account.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield account

    def _make_room(self, num_bytes: int) -> int:
        """Delete what was used longest ago; return what the rest takes."""
        files = sorted(self._files())
        used_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used_bytes + num_bytes <= self.max_bytes * _KEPT:
                break
            path.unlink(missing_ok=True)
            used_bytes -= size
        return used_bytes

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield when each file was last used, its size and its path; those left half written count too."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                if path != self.folder / _ACCOUNT:
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        yield stat.st_mtime_ns, stat.st_size, path


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)  # not flushed: what a power cut spoils does not fit its checksum
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
