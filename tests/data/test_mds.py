"""MDS against files that MosaicML Streaming 0.13 wrote (tests/data/mosaics, by tests/parity/streaming.py)."""

import bz2
import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pixart_data import mds
from pixart_data.arrivals import Unusable
from pixart_data.errors import DataError

FILES = Path(__file__).parent / "mosaics"
NAMES = ["key", "caption", "number", "score", "moments", "latents_256", "fixed", "any", "t5"]


def expected(number):
    """As in tests/parity/streaming.py."""
    ramp = np.arange(8 * 4 * 6, dtype=np.float32) / 8 + number
    return {
        "key": f"source/{number:03d}",
        "caption": f"caption {number} \u00e9\u4e2d",
        "number": number - 1,
        "score": number / 2,
        "moments": ramp.astype(np.float16).reshape(2, 4, 4, 6),
        "latents_256": bytes(range(number, number + 7)),
        "fixed": np.full((2, 3), number, np.float32),
        "any": np.arange(number + 1, dtype=np.int16),
        "t5": np.arange((number + 1) * 5, dtype=np.uint16).reshape(number + 1, 5),
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            assert found[name].tobytes() == value.tobytes(), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_reads_what_the_library_wrote(kind):
    shards = mds.read_index(FILES / kind)
    assert [shard.num_samples for shard in shards] == [2, 2]
    samples = [sample for shard in shards for sample in mds.read_samples(shard, NAMES)]
    assert len(samples) == 4
    for number, sample in enumerate(samples):
        assert_same(sample, expected(number))


def test_reads_only_the_columns_asked_for():
    first, _ = mds.read_index(FILES / "plain")
    assert [sample for sample in mds.read_samples(first, ["number", "absent"])] == [{"number": -1}, {"number": 0}]


def test_writes_the_bytes_that_the_library_writes(tmp_path):
    columns = {"key": "str", "number": "int", "moments": "ndarray:float16", "latents_256": "bytes"}
    samples = [{name: expected(number)[name] for name in columns} for number in range(3)]
    mds.write_index(tmp_path, [mds.write_shard(tmp_path, 0, columns, samples)])
    [shard] = mds.read_index(tmp_path)
    for found, wanted in zip(mds.read_samples(shard, list(columns)), samples, strict=True):
        assert_same(found, wanted)
    theirs, _ = mds.read_index(FILES / "plain")
    for name, value in expected(1).items():
        encoding = theirs.encodings[theirs.names.index(name)]
        if encoding in ("str", "int", "bytes", "ndarray:float16", "ndarray:uint16"):
            assert mds.encode(encoding, value) in theirs.path.read_bytes(), name


@pytest.mark.parametrize(
    ("value", "side_bytes"), [(np.zeros((3, 255), np.uint16), 1), (np.zeros((256, 2), np.uint16), 2)]
)
def test_sides_of_arrays_take_the_least_bytes(value, side_bytes):
    data = mds.encode("ndarray:uint16", value)
    assert len(data) == 1 + 2 * side_bytes + value.nbytes
    assert mds.decode("ndarray:uint16", memoryview(data)).shape == value.shape


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(FILES, tmp_path / "mosaics"))


def test_a_flipped_bit_is_told_by_the_hash_in_the_index(copied):
    path = copied / "plain" / "shard.00001.mds"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    first, second = mds.read_index(copied / "plain")
    assert len(list(mds.read_samples(first, ["key"]))) == 2
    with pytest.raises(Unusable, match=r"shard.00001.mds: its sha1 is not the one in index.json"):
        list(mds.read_samples(second, ["key"]))


@pytest.mark.parametrize("kind", ["plain", "zstd"])
@pytest.mark.parametrize("keep", [0, 3, 30, -1])
def test_a_shard_that_is_cut_off_is_damaged(copied, kind, keep):
    [path] = (copied / kind).glob("shard.00000.*")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Unusable, match="shard.00000") as lost:
        list(mds.read_samples(mds.read_index(copied / kind)[0], ["key"]))
    assert lost.value.reason == "damaged_file"


def test_a_sample_with_wrong_sizes_is_lost_alone(copied):
    index = json.loads((copied / "plain" / "index.json").read_text())
    path = copied / "plain" / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    begin = int.from_bytes(data[4:8], "little")
    data[begin : begin + 4] = (1 << 20).to_bytes(4, "little")
    path.write_bytes(data)
    index["shards"][0]["raw_data"]["hashes"] = {}
    (copied / "plain" / "index.json").write_text(json.dumps(index))
    first, second = mds.read_samples(mds.read_index(copied / "plain")[0], NAMES)
    assert (first.reason, second["number"]) == ("damaged_file", 0)


def test_pickles_are_never_decoded():
    with pytest.raises(ValueError, match="columns of encoding pkl are not read"):
        mds.decode("pkl", memoryview(b"cos\nsystem\n(S'true'\ntR."))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["shards"][0].update(version=1), "expected an index of MDS shards of version 2"),
        (lambda index: index["shards"][0].update(format="json"), "expected an index of MDS shards of version 2"),
        (lambda index: index.pop("shards"), "expected an index of MDS shards of version 2"),
        (lambda index: index["shards"][0]["column_sizes"].__setitem__(0, "x"), "expected an index of MDS shards"),
        (lambda index: index["shards"][0]["column_sizes"].__setitem__(0, -8), "columns of negative size"),
        (lambda index: index["shards"][0]["column_sizes"].__setitem__(0, float("inf")), "expected an index of MDS"),
        (lambda index: index["shards"][0]["column_sizes"].pop(), "sizes of different numbers of columns"),
        (lambda index: index["shards"][0].update(samples=1 << 60), f"{1 << 60} samples in "),
        (lambda index: index["shards"][0]["raw_data"].update(bytes=1 << 60), f"2 samples in {1 << 60} bytes"),
        (
            lambda index: index["shards"][0]["raw_data"].update(basename="../x.mds"),
            "inside the folder, found '../x.mds'",
        ),
        (lambda index: index["shards"][0]["raw_data"].update(basename="/x.mds"), "inside the folder, found '/x.mds'"),
        (lambda index: index["shards"][0].update(zip_data={"basename": "a/../../x"}), "found 'a/../../x'"),
    ],
)
def test_an_index_of_another_kind_is_refused(copied, change, message):
    path = copied / "plain" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        mds.read_index(copied / "plain")


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected the index of MDS shards, found no such file; check the path"):
        mds.read_index(tmp_path)


def test_shards_in_folders_of_their_own_are_found(copied):
    """As `merge_index` of the library leaves them."""
    index = json.loads((copied / "plain" / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"plain/{shard['raw_data']['basename']}"
    (copied / "index.json").write_text(json.dumps(index))
    assert [len(list(mds.read_samples(shard, ["key"]))) for shard in mds.read_index(copied)] == [2, 2]


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zstd:3": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    "br": lambda data: pa.Codec("brotli").compress(data, asbytes=True),
    "snappy": lambda data: pa.Codec("snappy").compress(data, asbytes=True),
}


@pytest.mark.parametrize("algorithm", PACKERS)
def test_a_packed_shard_is_inflated_to_the_size_in_the_index_and_no_further(copied, algorithm):
    root = copied / "plain"
    path = root / "shard.00000.mds"
    data = path.read_bytes()
    path.unlink()
    index = json.loads((root / "index.json").read_text())
    index["shards"][0] |= {"compression": algorithm, "zip_data": {"basename": "packed"}}
    (root / "index.json").write_text(json.dumps(index))
    packed, pack = root / "packed", PACKERS[algorithm]
    packed.write_bytes(pack(data))
    assert len(list(mds.read_samples(mds.read_index(root)[0], ["key"]))) == 2
    packed.write_bytes(pack(data + bytes(1 << 26)))
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    with pytest.raises(Unusable, match="shard.00000.mds: ") as told:
        list(mds.read_samples(mds.read_index(root)[0], ["key"]))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told.value.reason == "damaged_file"
    assert peak_bytes < 16 << 20
    assert pa.total_allocated_bytes() == before
