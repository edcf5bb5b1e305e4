"""Training from an object store gives what training from a disk gives, whatever the store does meanwhile."""

import errno
import itertools
import os
import pickle
import shutil
from pathlib import Path

import pytest
import s3fs
import torch

from pixart_data import remotes
from pixart_data.errors import DataError, JobError
from pixart_data.storage import location
from pixart_model import train
from pixart_model.config import Data
from pixart_model.dataset import open_dataset
from tests.faults import FaultyProxy

TENSORS = ("moments", "text", "mask", "size_px", "ratio")


@pytest.fixture
def store(bucket, features):
    """The features in a bucket, as a URL."""
    root = location(bucket) / "features"
    for path in features.rglob("*"):
        if path.is_file():
            (root / path.relative_to(features).as_posix()).write_bytes(path.read_bytes())
    yield str(root)
    s3fs.S3FileSystem.clear_instance_cache()


def batches(dataset, count=14):
    cpu = torch.device("cpu")
    for host in itertools.islice(dataset.batches(0), count):
        batch = host.to(cpu)
        yield batch.keys, [getattr(batch, name).clone() for name in TENSORS]


def assert_same(found, wanted):
    found, wanted = list(found), list(wanted)
    assert [keys for keys, _ in found] == [keys for keys, _ in wanted]
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def data(root, cache, **keys):
    return Data(features=str(root), batch_size=4, run_length=1, cache_dir=str(cache), **keys)


def test_the_batches_of_a_store_are_those_of_a_disk_whatever_the_store_does(
    store, features, tmp_path, s3_server, monkeypatch
):
    wanted = list(batches(open_dataset(data(features, tmp_path / "a"))))
    with FaultyProxy(s3_server, seed=3, error_rate=0.1, reset_rate=0.05) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        assert_same(batches(open_dataset(data(store, tmp_path / "b"))), wanted)
        assert proxy.num_faults
        before = proxy.counters["requests"]
        dataset = open_dataset(data(store, tmp_path / "b"))
        opened = proxy.counters["requests"] - before
        assert_same(batches(dataset), wanted)
        assert proxy.counters["requests"] - before == opened  # all members were in the cache


def test_without_a_cache_members_are_fetched_each_time(store, features, tmp_path):
    dataset = open_dataset(data(store, tmp_path, cache_bytes=0))
    assert_same(batches(dataset), batches(open_dataset(data(features, tmp_path))))
    assert not (tmp_path / "members").exists()


def test_a_cache_keeps_its_bound(store, features, tmp_path):
    bound = 9_000
    dataset = open_dataset(data(store, tmp_path, cache_bytes=bound))
    assert_same(batches(dataset), batches(open_dataset(data(features, tmp_path))))
    held = sum(
        path.stat().st_size for path in (tmp_path / "members").rglob("*") if path.is_file() and path.name != "account"
    )
    assert 0 < held <= bound


def test_runs_are_longer_in_a_store_for_the_sake_of_fewer_requests(store, features, tmp_path):
    near = open_dataset(Data(features=store, batch_size=4, cache_dir=str(tmp_path)))
    told = open_dataset(Data(features=str(features), batch_size=4, run_length=8, cache_dir=str(tmp_path)))
    assert_same(batches(near), batches(told))


@pytest.mark.parametrize("damaged", ["fail", "skip"])
def test_damage_in_a_store_is_never_read_in_silence(store, features, tmp_path, damaged):
    dataset = open_dataset(data(features, tmp_path))
    shard = dataset.images.shards[0]
    path = location(store) / "256px" / shard
    content = bytearray(path.read_bytes())
    entry = next(e for e in dataset.images.entries if e["shard"] == 0)
    content[int(entry["offset"]) + 5] ^= 4
    path.write_bytes(bytes(content))
    [lost] = dataset.images.keys([int(entry["row"])])
    remote = open_dataset(data(store, tmp_path, damaged=damaged))
    if damaged == "fail":
        with pytest.raises(DataError, match="verify"):
            list(batches(remote))
        return
    wanted = {key: tensors[0][i] for keys, tensors in batches(dataset) for i, key in enumerate(keys)}
    for keys, tensors in batches(remote):
        assert lost not in keys
        for i, key in enumerate(keys):
            assert torch.equal(tensors[0][i], wanted[key])


def test_samples_past_the_end_of_a_shard_that_was_cut_are_skipped(store, features, tmp_path):
    dataset = open_dataset(data(features, tmp_path))
    trained = {key for keys, _ in batches(dataset) for key in keys}
    for last in sorted(dataset.images.entries, key=lambda entry: (-int(entry["shard"]), int(entry["offset"])))[::-1]:
        [lost] = dataset.images.keys([int(last["row"])])
        if lost in trained:
            break
    path = location(store) / "256px" / dataset.images.shards[int(last["shard"])]
    path.write_bytes(path.read_bytes()[: int(last["offset"])])  # not a byte of it is there: S3 answers 416
    found = {key for keys, _ in batches(open_dataset(data(store, tmp_path, damaged="skip"))) for key in keys}
    assert trained - found == {lost}
    with pytest.raises(DataError, match="ends early.*pixart verify"):
        list(batches(open_dataset(data(store, tmp_path))))


def test_of_copies_of_indexes_those_used_last_stay(store, features, tmp_path, monkeypatch):
    monkeypatch.setattr(remotes, "MAX_COPIES", 3)
    sets = tmp_path / "sets"
    for number in range(3):
        old = sets / f"{number}"
        old.mkdir(parents=True)
        (old / "entries.bin").write_bytes(b"of another set")
        os.utime(old, (number, number))
    os.utime(sets / "0")
    (sets / "2" / ".tmp-of-a-killed-process").write_bytes(b"x")
    os.utime(sets / "2" / ".tmp-of-a-killed-process", (1, 1))
    os.utime(sets / "2", (2, 2))
    first = remotes.open_set(location(store) / "256px", tmp_path, 0)
    assert {path.name for path in sets.iterdir()} == {"0", "2", first.manifest.entries_sha256}
    assert [path.name for path in (sets / "2").iterdir()] == ["entries.bin"]
    copy = first.entries_path
    os.utime(copy.parent, (5, 5))
    taken_ns = copy.stat().st_mtime_ns
    again = remotes.open_set(location(store) / "256px", tmp_path, 0)
    assert copy.parent.stat().st_mtime > 5  # used just now
    assert copy.stat().st_mtime_ns == taken_ns  # this names the plans that were made of it
    assert first.index_path.is_file()
    assert {path.name for path in sets.iterdir()} == {"0", copy.parent.name, first.index_path.parent.name}
    monkeypatch.setattr(remotes, "MAX_COPIES", 1)
    os.utime(copy.parent, (5, 5))
    shutil.rmtree(first.index_path.parent)
    assert first.index_path.is_file()
    assert not copy.exists()
    assert first.entries["key"].tolist() == again.entries["key"].tolist() != []  # mapped: still readable
    wanted = batches(open_dataset(data(features, tmp_path / "elsewhere")))
    assert_same(batches(open_dataset(data(store, tmp_path))), wanted)  # copied again; those in use stay


def test_a_full_cache_disk_is_told_with_what_moves_the_cache(store, tmp_path, monkeypatch):
    def get_file(source, target):
        Path(target).write_bytes(b"as much as there was room for")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(location(store).fs, "get_file", get_file)
    with pytest.raises(JobError, match=r"cache: expected room .* No space left .* data.cache_dir in a job file"):
        open_dataset(data(store, tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_cache_folder_that_cannot_be_made_is_told_with_what_moves_it(store, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(JobError, match=r"cache: expected room .* data.cache_dir in a job file"):
        remotes.open_set(location(store) / "256px", tmp_path / "cache", 0)


def test_a_copy_is_not_made_twice_on_the_scratch_disk(store, tmp_path, monkeypatch):
    def scratch_file(name):
        raise AssertionError(f"{name}: a copy on the scratch disk")

    monkeypatch.setattr("pixart_data.storage.scratch_file", scratch_file)
    assert len(remotes.open_set(location(store) / "256px", tmp_path, 0))


def test_an_index_that_was_replaced_is_refused(store, tmp_path):
    path = location(store) / "256px" / "entries.bin"
    path.write_bytes(path.read_bytes()[64:] + bytes(64))
    with pytest.raises(DataError, match="entries.bin: damaged: it is not what the manifest speaks of"):
        open_dataset(data(store, tmp_path))


def test_a_dataset_in_a_store_can_be_sent_to_another_process(store, features, tmp_path):
    copy = pickle.loads(pickle.dumps(open_dataset(data(store, tmp_path))))
    assert_same(batches(copy), batches(open_dataset(data(features, tmp_path))))


def test_training_from_a_store_gives_the_weights_of_training_from_a_disk(store, make_job, tmp_path):
    weights = []
    for name, keys in (("disk", {}), ("store", {"features": store})):
        job = make_job(
            run={"output": str(tmp_path / name)}, data={**keys, "run_length": 1, "cache_dir": str(tmp_path / "cache")}
        )
        weights.append((train.run(job) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
