import errno
import fcntl
import multiprocessing
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data import caches
from pixart_data.caches import Cache


def put(cache, name, data):
    cache.put_many({name: data})
    return cache.get(name) == data


def accounted(folder, max_bytes=1 << 30):
    """What the account says, which must be whole."""
    with Cache(folder, max_bytes)._locked() as account:
        assert account.load()
        return sum(account.num_bytes)


def used_at(cache, name, seconds):
    os.utime(cache._place(name)[1], (seconds, seconds))


def test_what_was_put_is_there_until_it_must_make_room(tmp_path):
    cache = Cache(tmp_path / "cache", 1000)
    for number in range(9):
        assert put(cache, f"set/{number}", bytes([number]) * 100)
        used_at(cache, f"set/{number}", number)
    assert cache.get("set/0") == bytes(100)  # used just now
    assert put(cache, "set/9", b"x" * 200)
    assert cache.get("set/1") is None  # used longest ago
    assert cache.get("set/0") == bytes(100)
    assert cache.get("set/9") == b"x" * 200
    assert cache.get("set/8") == b"\x08" * 100
    assert cache.size_bytes() <= 1000


def test_of_a_large_cache_a_sample_is_looked_at_and_what_goes_is_among_the_oldest(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "_SAMPLE_FILES", 100)
    cache = Cache(tmp_path, 1000 * 10)
    names = [str(number) for number in range(1000)]
    cache.put_many(dict.fromkeys(names, b"x" * 10))
    for number, name in enumerate(names):
        used_at(cache, name, number)
    looked = []
    files = Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self, folder: looked.append(folder) or files(self, folder))
    for number in range(20):
        assert put(cache, f"new {number}", b"y" * 10)
    assert len(set(looked)) < caches._NUM_FOLDERS / 4  # not the whole cache, and not for each file
    gone = [number for number, name in enumerate(names) if cache.get(name) is None]
    assert 20 <= len(gone) < 60
    assert max(gone) < 400  # of 1,000; an eighth of a sample, give or take


def test_a_file_that_is_too_large_is_not_kept_and_pushes_nothing_out(tmp_path):
    cache = Cache(tmp_path, 1000)
    put(cache, "small", b"x" * 10)
    assert not put(cache, "large", b"x" * 1001)
    assert cache.get("small") == b"x" * 10


def test_of_files_that_do_not_fit_together_some_are_kept(tmp_path):
    cache = Cache(tmp_path, 1000)
    cache.put_many({str(number): b"x" * 300 for number in range(9)})
    assert cache.size_bytes() == 900 == accounted(tmp_path)


def test_a_later_run_knows_what_is_there(tmp_path):
    put(Cache(tmp_path, 1000), "a", b"x" * 600)
    later = Cache(tmp_path, 1000)
    assert later.get("a") == b"x" * 600
    put(later, "b", b"y" * 600)
    assert later.get("a") is None
    assert later.size_bytes() == 600 == accounted(tmp_path)


def test_many_files_are_put_under_one_lock_and_none_is_written_twice(tmp_path, monkeypatch):
    locks, written = [], []
    flock, write = fcntl.flock, caches._write
    monkeypatch.setattr(fcntl, "flock", lambda *args: (locks.append(args), flock(*args)))
    monkeypatch.setattr(caches, "_write", lambda path, data: (written.append(path), write(path, data)))
    cache = Cache(tmp_path, 10_000)
    files = {f"set/{number}": os.urandom(50) for number in range(64)}
    cache.put_many(files)
    assert len(locks) == 1
    cache.put_many(files)
    assert len(written) == 64
    assert all(cache.get(name) == data for name, data in files.items())
    assert accounted(tmp_path) == cache.size_bytes() == 64 * 50


def test_dropped_files_are_accounted_for_when_room_is_made(tmp_path):
    cache = Cache(tmp_path, 1000)
    put(cache, "a", b"x" * 500)
    cache.drop("a")
    cache.drop("a")
    assert cache.get("a") is None
    assert put(cache, "b", b"x" * 600)  # the account is over the bound: folders are looked at
    assert cache.size_bytes() == 600 == accounted(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\0", b"\0" * 8 * (caches._NUM_FOLDERS + 2), b"\xff" * 5000])
def test_a_damaged_account_is_made_anew(tmp_path, damage):
    cache = Cache(tmp_path, 1000)
    put(cache, "a", b"x" * 500)
    (tmp_path / "account").write_bytes(damage)
    put(cache, "b", b"x" * 300)
    assert accounted(tmp_path) == 800
    (tmp_path / "account").write_bytes(damage)
    put(cache, "c", b"x" * 300)
    assert cache.size_bytes() <= 1000


def test_a_disk_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(tmp_path / "file" / "cache", 1000)
    assert not put(cache, "a", b"x")


def test_a_disk_that_is_full_takes_what_fits_and_the_account_knows(tmp_path, monkeypatch):
    cache = Cache(tmp_path, 1000)
    rename = os.rename

    def full(staged, path):
        if path == cache._place("b")[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(staged, path)

    monkeypatch.setattr(os, "rename", full)
    cache.put_many({"a": b"x" * 100, "b": b"y" * 100, "c": b"z" * 100})
    assert cache.get("a") == b"x" * 100
    assert cache.get("b") is cache.get("c") is None
    assert cache.size_bytes() == 100 == accounted(tmp_path)


def test_a_cache_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    cache = Cache(tmp_path, 1000)
    put(cache, "a", b"x" * 10)

    def refuse(*args):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)  # root, who runs tests in containers, may write everywhere
    monkeypatch.setattr(caches, "_open_account", refuse)
    assert cache.get("a") == b"x" * 10
    cache.put_many({"b": b"x"})
    assert cache.get("b") is None


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=60), bound=st.integers(300, 1500))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_bound_holds_at_every_moment(tmp_path_factory, sizes, bound):
    cache = Cache(tmp_path_factory.mktemp("cache"), bound)
    for number, size in enumerate(sizes):
        assert put(cache, f"{number % 7}/{number}", b"x" * size) == (size <= bound)
        assert cache.size_bytes() <= bound


def _fill(folder, who):
    cache = Cache(folder, 20_000)
    for number in range(0, 100, 4):
        cache.put_many({f"{who}-{number + i}": b"x" * 500 for i in range(4)})


def _fill_until_killed(folder, num_renames):
    rename = os.rename
    left = iter(range(num_renames))

    def counted(*args):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)

    os.rename = counted
    _fill(folder, f"killed after {num_renames}")


def test_processes_share_one_bound_and_may_be_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_fill, args=(tmp_path, who)) for who in range(2)]
    others += [context.Process(target=_fill_until_killed, args=(tmp_path, 41))]
    for other in others:
        other.start()
    most, cache = 0, Cache(tmp_path, 20_000)
    while any(other.is_alive() for other in others):
        with cache._locked():  # files come and go while they are counted: the sum of all would be of no one moment
            most = max(most, cache.size_bytes())
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, -signal.SIGKILL]
    assert 0 < most <= 20_000
    assert 10_000 < Cache(tmp_path, 20_000).size_bytes() <= accounted(tmp_path, 20_000) <= 20_000
    _fill(tmp_path, "later")
    assert Cache(tmp_path, 20_000).size_bytes() <= accounted(tmp_path, 20_000) <= 20_000
    assert put(Cache(tmp_path, 20_000), "last", b"x" * 20_000)  # nothing that was left behind is in the way
    assert Cache(tmp_path, 20_000).size_bytes() == 20_000 == accounted(tmp_path)
