"""A folder of bounded size for what was fetched from elsewhere; what was used longest ago makes room.

Several processes may share the folder. Its account says what the files in each subfolder take, and is kept under a
lock, which the kernel lets go of when a process dies. It is written before files are, and after they were deleted: a
kill leaves it saying too much, never too little, and looking at a subfolder sets it right. A file's time of
modification is when it was last used, so that a later run knows too.
"""

import contextlib
import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pixart_data.storage import TEMPORARY

_ACCOUNT = "account"
_NUM_FOLDERS = 256  # files are spread over them by a hash of their name: a few folders are a fair sample of all
_SAMPLE_FILES = 1024  # among which those used longest ago are looked for: all of a small cache, 5 ms of a large one
_SAMPLE_SHARE = 8  # of the sample, one in so many goes: as if all had been looked at, give or take that share
_MARK = 0x70697861  # so that a file of zeros, which a power cut leaves behind, is no account


class _File(NamedTuple):
    """A file in the cache, and which folder it is in; those used longest ago come first."""

    used_ns: int
    size_bytes: int
    folder: int
    path: str


class Cache:
    """Files by name, of at most `max_bytes` together.

    A disk that fails or is full does no harm: what cannot be kept is fetched again. One that can only be read is read.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def get(self, name: str) -> bytes | None:
        """Return a file's content, or None if it is not here."""
        _, path = self._place(name)
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read()
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def put_many(self, files: Mapping[str, bytes]) -> None:
        """Keep files, making room for them first; of more than `max_bytes`, those that fit."""
        with contextlib.suppress(OSError), self._locked() as account:
            wanted = []
            num_bytes = 0
            for name, data in files.items():
                folder, path = self._place(name)
                if num_bytes + len(data) <= self.max_bytes and not os.path.exists(path):
                    wanted.append((folder, path, data))
                    num_bytes += len(data)
            if wanted:
                self._make_room(account, num_bytes)
                _write_all(account, wanted)

    def drop(self, name: str) -> None:
        """Delete a file; the account learns of it when its folder is looked at next."""
        with contextlib.suppress(OSError):
            os.unlink(self._place(name)[1])

    def size_bytes(self) -> int:
        """Return what the files take, by looking at them."""
        return sum(self._folder_bytes(folder) for folder in range(_NUM_FOLDERS))

    def _place(self, name: str) -> tuple[int, str]:
        """Return the number of the folder a file belongs in, and the file's path."""
        digest = hashlib.blake2b(name.encode(), digest_size=16)
        folder = int.from_bytes(digest.digest()[:2]) % _NUM_FOLDERS
        return folder, f"{self._folder(folder)}/{digest.hexdigest()}"

    def _folder(self, number: int) -> str:
        return f"{self.folder}/{number:03x}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator["_Account"]:
        """Give the account, for as long as the folder's lock is held."""
        path = self.folder / _ACCOUNT
        try:
            handle = _open_account(path)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = _open_account(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            account = _Account(handle)
            if not account.load():
                os.ftruncate(handle, 0)
                account.num_bytes = array("q", map(self._folder_bytes, range(_NUM_FOLDERS)))
            yield account
        finally:
            os.close(handle)

    def _make_room(self, account: "_Account", num_bytes: int) -> None:
        """Delete what was used longest ago, as far as a sample tells, and more than needed: not each batch samples."""
        while sum(account.num_bytes) + num_bytes > self.max_bytes:
            sample = sorted(self._sample(account))
            for file in sample[: len(sample) // _SAMPLE_SHARE + 1]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.path)
                account.num_bytes[file.folder] -= file.size_bytes

    def _sample(self, account: "_Account") -> list[_File]:
        """Return the files of the next folders, whose part of the account is set right."""
        sample: list[_File] = []
        for _ in range(_NUM_FOLDERS):
            folder = account.next_folder
            account.next_folder = (folder + 1) % _NUM_FOLDERS
            if account.num_bytes[folder]:
                files = list(self._files(folder))
                account.num_bytes[folder] = sum(file.size_bytes for file in files)
                sample += files
                if len(sample) >= _SAMPLE_FILES:
                    break
        return sample

    def _folder_bytes(self, folder: int) -> int:
        return sum(file.size_bytes for file in self._files(folder))

    def _files(self, folder: int) -> Iterator[_File]:
        """Yield the files in a folder; one left half written counts, too."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder(folder)) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield _File(stat.st_mtime_ns, stat.st_size, folder, entry.path)


class _Account:
    """What the files in each folder take, in an open file whose lock is held; and which folder is looked at next."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.next_folder = 0
        self.num_bytes = array("q", bytes(8 * _NUM_FOLDERS))

    def load(self) -> bool:
        """Read it; return whether it is whole."""
        words = array("q")
        data = os.pread(self._handle, 8 * (_NUM_FOLDERS + 2) + 1, 0)
        if len(data) != 8 * (_NUM_FOLDERS + 2):
            return False
        words.frombytes(data)
        check, self.next_folder, self.num_bytes = words[0], words[1] % _NUM_FOLDERS, words[2:]
        return check == self._check() and min(self.num_bytes) >= 0

    def save(self) -> None:
        """Write it, in one piece: cut off by a kill, it does not fit its check."""
        os.pwrite(self._handle, array("q", [self._check(), self.next_folder, *self.num_bytes]).tobytes(), 0)

    def _check(self) -> int:
        return _MARK ^ (sum(self.num_bytes) * _NUM_FOLDERS + self.next_folder)


def _open_account(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _write_all(account: _Account, files: list[tuple[int, str, bytes]]) -> None:
    """Write files that there is room for."""
    for folder, _, data in files:
        account.num_bytes[folder] += len(data)
    account.save()
    num_written = 0
    try:
        for _, path, data in files:
            _write(path, data)
            num_written += 1
    finally:
        if num_written < len(files):
            for folder, _, data in files[num_written:]:
                account.num_bytes[folder] -= len(data)
            account.save()


def _write(path: str, data: bytes) -> None:
    folder = os.path.dirname(path)
    staged = f"{folder}/{TEMPORARY}"  # one name for all: only who holds the lock writes
    try:
        handle = _open_new(staged)
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)
        handle = _open_new(staged)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.rename(staged, path)  # not flushed: what a power cut spoils does not fit its checksum
    except BaseException:
        os.unlink(staged)
        raise


def _open_new(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
