import errno
import os

import pytest
import s3fs
from zlib_ng.zlib_ng import crc32

from pixart_data import ranges
from pixart_data.caches import Cache
from pixart_data.errors import DataError, JobError
from pixart_data.ranges import Place, Ranges, join
from pixart_data.storage import location
from tests.faults import FaultyProxy

SHARDS = {name: os.urandom(300_000) for name in ("1.00/a.tar", "1.00/b.tar", "shards/c.tar")}


def place(shard, offset, size):
    return Place(shard, offset, size, crc32(SHARDS[shard][offset : offset + size]))


@pytest.fixture
def root(bucket):
    path = location(f"{bucket}/set")
    for name, data in SHARDS.items():
        (path / name).write_bytes(data)
    return path


PLACES = [
    place("1.00/b.tar", 200_000, 5_000),
    place("1.00/a.tar", 64, 10_000),
    place("1.00/a.tar", 11_000, 700),
    place("shards/c.tar", 299_000, 1_000),
    place("1.00/a.tar", 200_000, 3),
]


def wanted(places):
    return [SHARDS[p.shard][p.offset_bytes : p.offset_bytes + p.size_bytes] for p in places]


def test_members_come_in_the_order_they_were_asked_for(root):
    reader = Ranges(root)
    assert reader.read([*PLACES, PLACES[0]]) == wanted([*PLACES, PLACES[0]])
    assert reader.read([]) == []


def test_neighbours_share_a_request(root):
    found = list(join(PLACES))
    assert [(one.shard, one.start, one.end) for one in found] == [
        ("1.00/a.tar", 64, 11_700),
        ("1.00/a.tar", 200_000, 200_003),
        ("1.00/b.tar", 200_000, 205_000),
        ("shards/c.tar", 299_000, 300_000),
    ]
    assert sorted(p for one in found for p in one.places) == sorted(PLACES)


def test_a_range_is_not_longer_than_one_connection_should_carry(monkeypatch):
    monkeypatch.setattr(ranges, "MAX_RANGE_BYTES", 2_000)
    places = [Place("s", n * 1_000, 1_000, 0) for n in range(5)]
    assert [(one.start, one.end) for one in join(places)] == [(0, 2_000), (2_000, 4_000), (4_000, 5_000)]
    assert [(one.start, one.end) for one in join([Place("s", 0, 9_000, 0)])] == [(0, 9_000)]


def test_what_was_fetched_is_not_fetched_again(root, tmp_path):
    cache = Cache(tmp_path, 1 << 20)
    assert Ranges(root, cache, "digest").read(PLACES) == wanted(PLACES)
    again = Ranges(root, cache, "digest")
    assert again.read(PLACES) == wanted(PLACES)
    assert again.num_requests == 0
    other = Ranges(root, cache, "another digest")
    other.read(PLACES[:1])
    assert other.num_requests == 1


def test_a_cache_that_was_damaged_is_not_believed(root, tmp_path):
    cache = Cache(tmp_path, 1 << 20)
    Ranges(root, cache, "d").read(PLACES)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "account":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    reader = Ranges(root, cache, "d")
    assert reader.read(PLACES) == wanted(PLACES)
    assert reader.num_requests == 4
    assert reader.read(PLACES) == wanted(PLACES)
    assert reader.num_requests == 4


def test_damage_is_told_for_its_member_alone_and_never_cached(root, tmp_path):
    cache = Cache(tmp_path, 1 << 20)
    damaged = bytearray(SHARDS["1.00/a.tar"])
    damaged[5_000] ^= 1
    (root / "1.00/a.tar").write_bytes(bytes(damaged))
    (root / "shards/c.tar").unlink()
    for _ in range(2):
        found = Ranges(root, cache, "d").read(PLACES)
        for number, data in enumerate(found):
            if number in (1, 3):
                assert isinstance(data, DataError)
            else:
                assert data == wanted(PLACES)[number]
        assert "a.tar: damaged at byte 64" in str(found[1])
        assert "c.tar: missing" in str(found[3])


def test_a_shard_that_ends_early_is_damage(root):
    (root / "1.00/b.tar").write_bytes(SHARDS["1.00/b.tar"][:202_000])
    [found] = Ranges(root).read(PLACES[:1])
    assert isinstance(found, DataError)
    assert "b.tar: ends early" in str(found)


def test_a_member_past_the_end_of_its_shard_is_lost_alone(root, tmp_path):
    (root / "1.00/b.tar").write_bytes(SHARDS["1.00/b.tar"][:199_999])  # S3 answers 416: no byte of the range is there
    found = Ranges(root, Cache(tmp_path, 1 << 20), "d").read(PLACES)
    assert isinstance(found[0], DataError)
    assert "b.tar: ends early" in str(found[0])
    assert found[1:] == wanted(PLACES)[1:]
    with pytest.raises(DataError, match=r"b.tar: ends early"):
        Ranges(root).fetch("1.00/b.tar", 200_000, 5_000)
    neighbours = [place("1.00/b.tar", 199_000, 500), PLACES[0]]  # one request, of which a part is there
    found = Ranges(root).read(neighbours)
    assert found[0] == wanted(neighbours)[0]
    assert isinstance(found[1], DataError)


def test_another_refusal_is_not_taken_for_the_end_of_a_shard(root, monkeypatch):
    reader = Ranges(root)

    def refuse(*args, **kwargs):
        raise OSError(errno.EINVAL, "refused")  # the number that 416 gets, too

    with monkeypatch.context() as patch:
        patch.setattr(reader._store(), "cat_file", refuse)
        patch.setattr(
            reader._store(), "cat_ranges", lambda paths, *args, **kwargs: [OSError(errno.EINVAL)] * len(paths)
        )
        with pytest.raises(JobError, match="cannot read: refused"):
            reader.read(PLACES[:1])


def test_members_of_one_read_are_cached_together(root, tmp_path, monkeypatch):
    batches = []
    cache = Cache(tmp_path, 1 << 20)
    put_many = cache.put_many
    monkeypatch.setattr(cache, "put_many", lambda files: (batches.append(len(files)), put_many(files)))
    Ranges(root, cache, "d").read([*PLACES, PLACES[0]])
    Ranges(root, cache, "d").read(PLACES)
    assert batches == [len(PLACES)]


def test_faults_of_the_store_are_waited_out(root, s3_server, monkeypatch):
    with FaultyProxy(s3_server, seed=1, error_rate=0.2, reset_rate=0.1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        reader = Ranges(location(f"{root}"))
        places = [place(shard, start * 10_000, 9_000) for shard in SHARDS for start in range(0, 30, 15)]
        for _ in range(4):
            assert reader.read(places) == wanted(places)
        assert proxy.num_faults > 3


def test_a_store_that_is_gone_is_a_job_error(root, monkeypatch):
    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(JobError, match="cannot read"):
        Ranges(location(f"{root}")).read(PLACES)


@pytest.fixture(autouse=True)
def _no_client_outlives_its_test():
    yield
    s3fs.S3FileSystem.clear_instance_cache()
