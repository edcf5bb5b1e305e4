import multiprocessing
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data.caches import Cache


def test_what_was_put_is_there_until_it_must_make_room(tmp_path):
    cache = Cache(tmp_path / "cache", 1000)
    for number in range(9):
        assert cache.put(f"set/{number}", bytes([number]) * 100)
        os.utime(tmp_path / "cache" / "set" / str(number), (number, number))
    assert cache.get("set/0") == bytes(100)  # used just now
    assert cache.put("set/9", b"x" * 200)
    assert cache.get("set/1") is None  # used longest ago
    assert cache.get("set/0") == bytes(100)
    assert cache.get("set/9") == b"x" * 200
    assert cache.get("set/8") == b"\x08" * 100
    assert cache.size_bytes() <= 1000


def test_a_file_that_is_too_large_is_not_kept_and_pushes_nothing_out(tmp_path):
    cache = Cache(tmp_path, 1000)
    cache.put("small", b"x" * 10)
    assert not cache.put("large", b"x" * 1001)
    assert cache.get("large") is None
    assert cache.get("small") == b"x" * 10


def test_a_later_run_knows_what_is_there(tmp_path):
    Cache(tmp_path, 1000).put("a", b"x" * 600)
    later = Cache(tmp_path, 1000)
    assert later.get("a") == b"x" * 600
    later.put("b", b"y" * 600)
    assert later.get("a") is None
    assert later.size_bytes() == 600


def test_dropped_and_half_written_files_are_accounted_for_when_room_is_made(tmp_path):
    cache = Cache(tmp_path, 1000)
    cache.put("a", b"x" * 500)
    (tmp_path / ".tmp-of-a-killed-process").write_bytes(b"z" * 400)
    os.utime(tmp_path / ".tmp-of-a-killed-process", (1, 1))
    cache.drop("a")
    cache.put("b", b"x" * 600)  # the account is over the bound: the folder is walked
    assert cache.size_bytes() == 600
    assert (tmp_path / "account").read_text() == "600"


def test_a_damaged_account_is_made_anew(tmp_path):
    cache = Cache(tmp_path, 1000)
    cache.put("a", b"x" * 500)
    (tmp_path / "account").write_text("\0")
    cache.put("b", b"x" * 300)
    assert (tmp_path / "account").read_text() == "800"


def test_a_disk_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(tmp_path / "file" / "cache", 1000)
    assert not cache.put("a", b"x")
    assert cache.get("a") is None


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=60), bound=st.integers(300, 1500))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_bound_holds_at_every_moment(tmp_path_factory, sizes, bound):
    cache = Cache(tmp_path_factory.mktemp("cache"), bound)
    for number, size in enumerate(sizes):
        kept = cache.put(f"{number % 7}/{number}", b"x" * size)
        assert kept == (size <= bound * 0.9)
        assert cache.size_bytes() <= bound
        assert not kept or cache.get(f"{number % 7}/{number}") == b"x" * size


def _fill(folder, who):
    cache = Cache(folder, 20_000)
    for number in range(100):
        cache.put(f"{who}-{number}", b"x" * 500)


def test_processes_share_one_bound(tmp_path):
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_fill, args=(tmp_path, who)) for who in range(2)]
    for other in others:
        other.start()
    most = 0
    while any(other.is_alive() for other in others):
        most = max(most, Cache(tmp_path, 20_000).size_bytes())
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert 0 < most <= 20_000 + 500  # a file is counted twice while it gets its name
    assert int((tmp_path / "account").read_text()) == Cache(tmp_path, 20_000).size_bytes() > 10_000
