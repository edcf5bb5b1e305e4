"""The joined plan file, the order of batches, and mixtures of datasets."""

import collections
import contextlib
import hashlib
import itertools
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data.entries import IMAGE_ENTRY, TEXT_ENTRY, checks
from pixart_data.errors import ConfigError, DataError, JobError
from pixart_model import joins
from pixart_model import orders as orders_module
from pixart_model.draws import draws, stream, uniform
from pixart_model.joins import EntriesFile
from pixart_model.orders import CHUNKS_PER_BLOCK, Mix, Order, dealt, interleaved
from pixart_model.plan import build, cached_plan
from pixart_model.quality import shuffle_quality
from pixart_model.roster import NONE, open_plan

settings.register_profile(
    "plan",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
)
quick = settings.get_profile("plan")

histograms = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)
small = st.integers(1, 9)
seeds = st.integers(0, 2**64 - 1)
orders = st.tuples(histograms, small, seeds, st.integers(1, 5), st.integers(1, 50))


@contextlib.contextmanager
def made(arguments, chunks_per_block=3):
    """An order whose buckets of a few samples have several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders_module, "CHUNKS_PER_BLOCK", chunks_per_block)
        yield Order(*arguments)


def picks_equal(one, other):
    return one.bucket == other.bucket and all(np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


# Random numbers


def test_the_generator_is_splitmix64():
    """The numbers are those that the reference implementation gives for the seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
    ]  # of its seed 1234567
    assert draws(1234567, range(4)).tolist() == expected
    assert stream(3, 5, 7) == int(draws(draws(stream(3), [5]), [7])[0])
    assert draws(0, 5).tolist() == draws(0, [5]).tolist()
    assert stream(-1) == stream(2**64 - 1)
    values = uniform(draws(0, range(10_000)))
    assert 0 <= values.min() < 0.001 < 0.999 < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)


# The order of an epoch


@quick
@given(orders, st.integers(0, 60), st.integers(1, 4))
def test_epochs_hold_every_sample_once_up_to_the_tails_they_carry(arguments, epoch, num_epochs):
    with made(arguments) as order:
        counts, m = order.bucket_counts, order.batch_size
        starts = np.cumsum(counts) - counts
        emitted = {bucket: ([], []) for bucket in range(len(counts))}
        for number in range(order.first_batch(epoch), order.first_batch(epoch + num_epochs)):
            picks = order.batch(number)
            assert len(picks.samples) == len(picks.epochs) == m
            emitted[picks.bucket][0].extend((picks.samples.astype(np.int64) - starts[picks.bucket]).tolist())
            emitted[picks.bucket][1].extend(picks.epochs.tolist())
        for bucket, (rows, rounds) in emitted.items():
            size = int(counts[bucket])
            first = epoch * size // m * m  # the carried tail, `epoch * size - first` samples, leads
            last = (epoch + num_epochs) * size // m * m
            assert rounds == [position // size for position in range(first, last)]
            assert len(rows) == last - first  # so fewer than m are left for later
            for one_round, group in itertools.groupby(zip(rounds, rows, strict=True), key=lambda pair: pair[0]):
                seen = sorted(row for _, row in group)
                whole = first <= one_round * size and (one_round + 1) * size <= last
                assert seen == list(range(size)) if whole else len(set(seen)) == len(seen)
                assert set(seen) <= set(range(size))


@quick
@given(orders, st.integers(0, 500), st.integers(1, 60))
def test_what_an_epoch_lacks_of_a_round_leads_the_next(arguments, epoch, more):
    """The tail of round e - 1 that epoch e - 1 left over is, sample for sample, what epoch e begins with."""
    with made(arguments) as order:
        counts, m = order.bucket_counts, order.batch_size
        by_bucket = collections.defaultdict(list)
        numbers = range(order.first_batch(epoch), order.first_batch(epoch) + more)
        for picks in map(order.batch, numbers):
            by_bucket[picks.bucket].append(picks)
        for bucket, batches in by_bucket.items():
            carried = epoch * int(counts[bucket]) % m
            first = np.concatenate([picks.epochs for picks in batches])[:carried]
            assert (first < epoch).all()
            assert np.concatenate([picks.epochs for picks in batches])[carried:][:1].tolist() in ([], [epoch])


@quick
@given(orders, st.integers(0, 10**6), st.integers(0, 10**9))
def test_a_batch_is_located_without_counting(arguments, epoch, number):
    with made(arguments) as order:
        found, place = order.locate(number)
        assert order.first_batch(found) <= number < order.first_batch(found + 1)
        assert number == order.first_batch(found) + place
        assert order.epoch_of(number) < found + 1
        assert order.epoch_of(number) * order.num_samples == pytest.approx(number * order.batch_size)
        if order.num_batches(epoch):
            assert order.locate(order.first_batch(epoch)) == (epoch, 0)
        sizes = [epoch_size for epoch_size in (order.num_batches(epoch + i) for i in range(3))]
        assert max(sizes) - min(sizes) <= np.count_nonzero(order.bucket_counts)


@quick
@given(orders, st.integers(0, 10**7), st.randoms(use_true_random=False))
def test_any_batch_can_be_asked_for_first(arguments, start, shuffler):
    with made(arguments) as order:
        numbers = list(range(start, start + 12))
        expected = [order.batch(number) for number in numbers]
        shuffled = shuffler.sample(numbers, len(numbers))
        again = pickle.loads(pickle.dumps(order))
        for number in shuffled:
            assert picks_equal(again.batch(number), expected[number - start])
        with ThreadPoolExecutor(4) as pool:
            threaded = list(pool.map(pickle.loads(pickle.dumps(order)).batch, numbers))
        assert all(map(picks_equal, threaded, expected))


@quick
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 4), st.integers(1, 5))
def test_ranks_and_workers_read_one_order(first, world, num_workers, rounds):
    """Whatever their numbers: a `DataLoader` takes from its workers in turn, and ranks step together."""
    by_rank = []
    for rank in range(world):
        if num_workers == 0:
            numbers = dealt(first, rank, world)
        else:
            workers = [dealt(first, rank, world, worker, num_workers) for worker in range(num_workers)]
            numbers = itertools.chain.from_iterable(zip(*workers, strict=True))
        by_rank.append(list(itertools.islice(numbers, rounds)))
    assert [number for step in zip(*by_rank, strict=True) for number in step] == list(
        range(first, first + world * rounds)
    )


def test_seeds_and_epochs_and_buckets_differ():
    def epoch_of(seed, epoch):
        order = Order([60, 60], 5, seed)
        numbers = range(order.first_batch(epoch), order.first_batch(epoch + 1))
        by_bucket = {0: [], 1: []}
        for picks in map(order.batch, numbers):
            by_bucket[picks.bucket] += (picks.samples % 60).tolist()
        return [tuple(by_bucket[0]), tuple(by_bucket[1]), tuple(order.batch(number).bucket for number in numbers)]

    found = [epoch_of(0, 0), epoch_of(0, 1), epoch_of(1, 0), epoch_of(2**64 - 1, 0)]
    rows = [row for one in found for row in one[:2]]
    assert len(set(rows)) == len(rows)
    assert len({one[2] for one in found}) == len(found)
    assert epoch_of(0, 0) == found[0]


def test_the_order_is_the_same_on_every_machine_and_numpy():
    order = Order([5, 0, 1, 17], 4, seed=7, run_length=2, block_rows=100)
    found = [(picks.bucket, picks.samples.tolist(), picks.epochs.tolist()) for picks in map(order.batch, range(8))]
    assert found == PINNED
    assert [order.locate(number) for number in (0, 4, 5, 6, 1_000_000)] == PINNED_PLACES
    assert order.batch(10**9).samples.tolist() == PINNED_FAR


def test_a_bucket_smaller_than_a_batch_waits_until_it_has_enough():
    order = Order([1, 3], 8, seed=0)
    assert [order.num_batches(epoch) for epoch in range(8)] == [0, 0, 1, 0, 0, 1, 0, 2]
    found = [order.batch(number) for number in range(4)]
    assert sorted(picks.bucket for picks in found) == [0, 1, 1, 1]
    alone = next(picks for picks in found if picks.bucket == 0)
    assert alone.samples.tolist() == [0] * 8
    assert alone.epochs.tolist() == list(range(8))
    with pytest.raises(DataError, match="the plan: expected samples, found none"):
        Order([0, 0], 8, 0)
    with pytest.raises(ValueError, match="at least 1"):
        Order([1], 0, 0)


def test_more_batches_than_one_segment():
    order = Order([9_000, 1, 7_000], 1, seed=3)
    found = [order.batch(number) for number in range(order.num_batches(0))]
    assert sorted(int(picks.samples[0]) for picks in found) == list(range(16_001))
    first = [picks.bucket for picks in found[:4000]]
    assert first.count(0) == pytest.approx(4000 * 9 / 16, abs=3)


@quick
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), seeds, st.integers(1, 7))
def test_kinds_are_interleaved_in_proportion_at_every_prefix(histogram, seed, segments):
    counts = np.array(histogram)
    parts = [interleaved(counts, seed, segment, segments) for segment in range(segments)]
    kinds = np.concatenate([part[0] for part in parts])
    assert np.array_equal(kinds, interleaved(counts, seed, 0, 1)[0])
    assert [part[2] for part in parts] == [sum(len(part[0]) for part in parts[:i]) for i in range(segments)]
    assert np.array_equal(np.bincount(kinds, minlength=len(counts)), counts)
    seen = np.cumsum(kinds[:, None] == np.arange(len(counts)), axis=0)  # (T, kinds)
    ordinals = np.concatenate([part[1] for part in parts])
    assert np.array_equal(ordinals, seen[np.arange(len(kinds)), kinds] - 1)
    fair = np.arange(1, len(kinds) + 1)[:, None] * counts / counts.sum()
    assert (np.abs(seen - fair) <= 1 + np.count_nonzero(counts) * counts / counts.sum()).all()


def test_the_turns_of_buckets_are_random_where_proportion_allows():
    """Of kinds that are as frequent, each stretch holds all once, in any of the orders with the same chance."""
    kinds = interleaved(np.full(4, 600), stream(1), 0, 1)[0].reshape(-1, 4)
    seen = collections.Counter(map(tuple, kinds.tolist()))
    assert len(seen) == 24
    assert sum((count - 25) ** 2 / 25 for count in seen.values()) < 49.7


def test_runs_stay_together_and_blocks_bound_the_shuffle():
    run, rows = 4, 4096
    order = Order([rows], 1, seed=5, run_length=run, block_rows=256)
    assert order.chunk_rows == run
    found = np.array([int(order.batch(number).samples[0]) for number in range(rows)]).reshape(-1, run)
    assert (np.sort(found, axis=1) == found.min(axis=1, keepdims=True) + np.arange(run)).all()
    assert (found.min(axis=1) % run == 0).all()
    assert (np.diff(found, axis=1) != 1).any()  # shuffled inside a run
    wide = Order([rows], 1, seed=5, run_length=1, block_rows=1024)
    assert wide.chunk_rows == 16
    found = np.array([int(wide.batch(number).samples[0]) for number in range(rows)]).reshape(4, 1024)
    for block in found:
        assert len(np.unique(block // wide.chunk_rows)) == CHUNKS_PER_BLOCK
    assert (np.diff(np.unique(found[0] // wide.chunk_rows)) > 1).any()  # its chunks are from all over the bucket
    later = np.array([int(wide.batch(rows + number).samples[0]) for number in range(1024)])
    assert set(later // wide.chunk_rows) != set(found[0] // wide.chunk_rows)  # each epoch has blocks of its own


def test_runs_of_one_in_one_block_are_a_full_shuffle():
    """Every order of four samples is as likely as any other: chi-squared of 23 degrees, its 99.9th percentile 49.7."""
    seen = collections.Counter()
    for seed in range(1200):
        order = Order([4], 4, seed, run_length=1, block_rows=4)
        seen[tuple(order.batch(0).samples.tolist())] += 1
    assert len(seen) == 24
    assert sum((count - 50) ** 2 / 50 for count in seen.values()) < 49.7


# Mixtures


@quick
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), seeds, st.integers(0, 10**6))
def test_a_mixture_keeps_its_proportions_and_leaves_no_gap(weights, seed, cycles):
    mix = Mix(weights, seed)
    shares = np.array(weights) / sum(weights)
    batches = sum(mix.given(cycles))
    assert all(
        abs(count - batches * share) <= 1 + 1e-6 * batches
        for count, share in zip(mix.given(cycles), shares, strict=True)
    )
    next_of = mix.given(cycles)
    for number in range(batches, batches + 150):
        dataset, own = mix.locate(number)
        assert own == next_of[dataset]
        next_of[dataset] += 1
        assert abs(next_of[dataset] - (number + 1) * shares[dataset]) <= 3 + len(weights) + 1e-6 * batches
    assert pickle.loads(pickle.dumps(mix)).locate(batches) == mix.locate(batches)


def test_a_mixture_is_exact_after_its_cycles():
    mix = Mix([3, 1], seed=0)
    assert [mix.given(cycles) for cycles in (0, 1, 1000)] == [[0, 0], [48, 16], [48_000, 16_000]]
    found = [mix.locate(number) for number in range(64)]
    assert collections.Counter(dataset for dataset, _ in found) == {0: 48, 1: 16}
    assert [mix.locate(number) for number in range(64)] != [Mix([3, 1], seed=1).locate(number) for number in range(64)]
    assert found[:12] == PINNED_MIX
    assert [Mix([5.5], 0).locate(number) for number in range(99)] == [(0, number) for number in range(99)]
    rare = Mix([1e5, 1], seed=0)
    assert sum(rare.given(1)) == 100_001
    assert rare.given(1)[1] == 1


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [float("inf")]])
def test_weights_must_be_numbers_above_zero(weights):
    with pytest.raises(ConfigError, match="expected numbers above 0"):
        Mix(weights, 0)


def test_a_weight_too_small_to_matter_is_refused():
    with pytest.raises(ConfigError, match="a millionth of the sum or more"):
        Mix([1, 1e-7], 0)


# How well it shuffles


def test_the_quality_of_a_shuffle():
    counts = [100_000, 0, 3]
    full = shuffle_quality(Order(counts, 32, 0, 1, 100_000), 100)
    assert full.num_batches == 100
    assert full.ordered.runs == full.full.runs == 32
    assert full.ordered.distance / full.full.distance == pytest.approx(1, abs=0.1)
    local = shuffle_quality(Order(counts, 32, 0, 8, 64), 100, lambda samples: samples // 1000)
    assert local.ordered.runs < 6 < 31 < local.full.runs
    assert local.ordered.distance < 0.5 * local.full.distance
    assert local.ordered.shards < 6 < 20 < local.full.shards
    told = re.search(r"draws from (.+) runs \(.*shards .* lie (.+) as far apart", str(local))
    assert float(told[1]) == pytest.approx(local.ordered.runs, abs=0.05)
    assert float(told[2]) == pytest.approx(local.ordered.distance / local.full.distance, abs=0.005)
    assert "shards" not in str(full)


def test_the_quality_of_no_batch_at_all():
    assert "no bucket holds a batch of 8" in str(shuffle_quality(Order([3, 4], 8, 0), 10))


# Joining


def write(path, dtype, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(records):
        records["check"] = checks(records)
    path.write_bytes(records.tobytes())
    return EntriesFile(path, hashlib.sha256(records.tobytes()).hexdigest())


def image_set(folder, keys, buckets=None):
    records = np.zeros(len(keys), IMAGE_ENTRY)
    records["key"] = keys
    records["row"] = np.arange(len(keys))[::-1]
    records["bucket"] = np.sort(buckets) if buckets is not None else 0
    return write(folder / "images/entries.bin", IMAGE_ENTRY, records)


def text_set(folder, keys, name="text"):
    records = np.zeros(len(keys), TEXT_ENTRY)
    records["key"] = keys
    records["row"] = np.arange(len(keys))
    return write(folder / name / "entries.bin", TEXT_ENTRY, records)


@pytest.fixture
def sets(tmp_path):
    """Of 50 images in three buckets and 50 texts 45 fit together."""
    keys = draws(9, range(55))
    images = image_set(tmp_path, keys[:50], np.arange(50) % 3)
    return images, text_set(tmp_path, keys[5:][::-1])


@contextlib.contextmanager
def small_pieces(chunk=7, part=4):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joins, "_CHUNK_ROWS", chunk)
        patch.setattr(joins, "_PART_ROWS", part)
        yield


@quick
@given(
    st.lists(st.integers(0, 40), unique=True),
    st.lists(st.lists(st.integers(0, 40), unique=True), max_size=3),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_images_meet_their_texts_in_any_order(image_keys, text_keys, all_kept, shuffler):
    names = draws(1, range(41)).tolist()
    names[:4] = [5, 2**64 - 1, 0, 6]  # hashes that share all but a few bits, too
    buckets = sorted(shuffler.randrange(3) for _ in image_keys)
    keep = np.array([all_kept or shuffler.random() < 0.7 for _ in image_keys], np.bool_)
    with tempfile.TemporaryDirectory() as name, small_pieces():
        folder = Path(name)
        images = image_set(folder, [names[key] for key in image_keys], buckets)
        texts = [text_set(folder, [names[key] for key in keys], f"t{i}") for i, keys in enumerate(text_keys)]
        counts = build(images, texts, 3, folder / "plan", None if all_kept else keep)
        joined = open_plan(folder / "plan")
        kept = keep[::-1]  # rows run backwards in `image_set`
        found = {
            number: [keys.index(key) if key in keys else NONE for keys in text_keys]
            for number, key in enumerate(image_keys)
            if kept[number] and (not text_keys or any(key in keys for keys in text_keys))
        }
        assert joined.images.tolist() == list(found)
        assert [texts.tolist() for texts in joined.texts] == [list(c) for c in zip(*found.values(), strict=True)] or [
            [] for _ in text_keys
        ]
        assert joined.bucket_counts.tolist() == [sum(buckets[n] == b for n in found) for b in range(3)]
        assert counts == joined.counts
        assert len(joined) == counts.samples == len(found)
        assert counts.left_out == len(image_keys) - kept.sum()
        assert counts.images == len(image_keys) == counts.samples + counts.left_out + counts.without_text
        assert counts.texts == tuple(sum(row[i] != NONE for row in found.values()) for i in range(len(text_keys)))
        assert counts.texts_without_image == tuple(len(set(keys) - set(image_keys)) for keys in text_keys)


def test_the_bytes_of_a_plan_depend_on_the_sets_alone(sets, tmp_path):
    build(sets[0], [sets[1]], 3, tmp_path / "one")
    with small_pieces(3, 2):
        build(sets[0], [sets[1]], 3, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert hashlib.sha256((tmp_path / "one").read_bytes()).hexdigest() == PINNED_PLAN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "one", "text", "two"]


@pytest.mark.parametrize("with_texts", [True, False])
def test_a_key_that_is_there_twice_is_refused(sets, tmp_path, with_texts):
    keys = draws(9, range(50)).tolist()
    texts = [sets[1]] if with_texts else []
    with pytest.raises(
        DataError, match="images/entries.bin: expected each key once, found rows 49 and 19 .* 64-bit hash; if"
    ):
        build(image_set(tmp_path / "a", [*keys[:30], keys[0], *keys[31:]]), texts, 1, tmp_path / "plan")
    for twice in (keys[7], 12345):  # with an image, and without
        doubled = text_set(tmp_path / "b", [*keys[:5], twice, *keys[30:], twice])
        with pytest.raises(DataError, match="text/entries.bin: expected each key once, found rows 5 and 26"):
            build(sets[0], [doubled], 3, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_entries_that_are_damaged_are_refused(sets, tmp_path):
    def refused(pattern):
        with pytest.raises(DataError, match=pattern):
            build(sets[0], [sets[1]], 3, tmp_path / "plan")
        assert not (tmp_path / "plan").exists()

    flipper = random.Random(0)
    for file in sets:
        whole = file.path.read_bytes()
        for position in flipper.sample(range(len(whole)), 30):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << flipper.randrange(8)
            file.path.write_bytes(damaged)
            record = position // (64 if file is sets[0] else 40)
            refused(f"{file.path}: damaged: record {record} does not fit its check; `pixart verify {file.path.parent}")
        file.path.write_bytes(whole[:-40] if file is sets[1] else whole[:-64])  # whole records
        refused(f"{file.path}: damaged: its SHA-256")
        file.path.write_bytes(whole[:-3])
        refused(f"{file.path}: damaged: expected records of")
        file.path.write_bytes(b"")
        refused(f"{file.path}: damaged: its SHA-256")
        file.path.unlink()
        refused(f"{file.path}: missing; run `pixart extract` again")
        file.path.write_bytes(whole)
    build(sets[0], [sets[1]], 3, tmp_path / "plan")


def test_entries_that_contradict_the_set_are_refused(sets, tmp_path):
    with pytest.raises(DataError, match="in the order of 2 buckets, found another order from record 0"):
        build(sets[0], [sets[1]], 2, tmp_path / "plan")
    with pytest.raises(DataError, match="expected rows below 49, as in index.parquet, found 49"):
        build(sets[0], [sets[1]], 3, tmp_path / "plan", keep=np.ones(49, np.bool_))
    records = np.fromfile(sets[0].path, IMAGE_ENTRY)[::-1].copy()
    with pytest.raises(DataError, match="of 3 buckets, found another order from record 16"), small_pieces(chunk=1):
        build(write(sets[0].path, IMAGE_ENTRY, records), [sets[1]], 3, tmp_path / "plan")


# Plan files


def test_a_plan_with_any_byte_changed_or_lost_does_not_open(sets, tmp_path):
    path = tmp_path / "plan"
    build(sets[0], [sets[1]], 3, path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
        with pytest.raises(DataError, match=f"{path}: damaged: .*; delete it: it is built anew"):
            open_plan(path)
        path.write_bytes(whole[:position])
        with pytest.raises(DataError, match=f"{path}: damaged"):
            open_plan(path)
    path.write_bytes(whole)
    assert len(open_plan(path)) == 45


def test_a_plan_goes_to_other_processes_by_its_path(sets, tmp_path):
    build(sets[0], [sets[1]], 3, tmp_path / "plan")
    joined = open_plan(tmp_path / "plan")
    packed = pickle.dumps(joined)
    assert len(packed) < 500
    again = pickle.loads(packed)
    assert isinstance(again.images, np.memmap)
    assert np.array_equal(again.images, joined.images)
    assert np.array_equal(again.texts[0], joined.texts[0])
    whole = (tmp_path / "plan").read_bytes()
    (tmp_path / "plan").unlink()
    assert joined.images.tolist() == list(range(5, 50))
    with pytest.raises(DataError, match="the plan file is gone; start again"):
        pickle.loads(packed)
    with pytest.raises(DataError, match="no such plan file"):
        open_plan(tmp_path / "plan")
    (tmp_path / "plan").write_bytes(whole[:-4])
    with pytest.raises(DataError, match=f"damaged: expected {len(whole)} bytes, found {len(whole) - 4}"):
        pickle.loads(packed)


# The folder of plans

DRIVER = """
import logging, os, signal, sys
from pathlib import Path
from pixart_model import plan, roster
from pixart_model.joins import EntriesFile

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[1]
if where == "matching":
    plan.match = die
elif where == "writing":
    roster.crc32 = die
elif where == "renaming":
    roster.os.replace = die
elif where == "waiting":
    found, built = plan._opened_whole, plan.build
    def opened_whole(path):
        joined = found(path)
        print("looked", flush=True)
        return joined
    def build(*args):
        print("building", flush=True)
        sys.stdin.readline()
        return built(*args)
    plan._opened_whole, plan.build = opened_whole, build
logging.basicConfig(level=logging.INFO)
folder, *files = sys.argv[2:]
images, *texts = [EntriesFile(Path(path), sha256) for path, sha256 in zip(files[::2], files[1::2])]
print(len(plan.cached_plan(Path(folder), images, texts, 3)))
"""


def driver(where, folder, sets):
    files = [word for file in sets for word in (str(file.path), file.sha256)]
    command = [sys.executable, "-c", DRIVER, where, str(folder), *files]
    root = Path(__file__).parents[2]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=root)


@pytest.mark.parametrize("where", ["matching", "writing", "renaming"])
def test_a_build_that_is_killed_leaves_no_plan(sets, tmp_path, where):
    folder = tmp_path / "plans"
    process = driver(where, folder, sets)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = [path for path in folder.iterdir() if path.name != "plans.lock"]
    assert len(left) == (where != "matching")  # what matching keeps on the disk has no name
    assert all(path.name.startswith(".tmp-") for path in left)
    if where == "writing":
        with pytest.raises(DataError, match="damaged"):
            open_plan(left[0])
    joined = cached_plan(folder, sets[0], [sets[1]], 3)
    assert len(joined) == 45
    assert sorted(path.name for path in folder.iterdir()) == [joined.path.name, "plans.lock"]


def test_processes_that_start_together_build_once(sets, tmp_path):
    processes = [driver("waiting", tmp_path / "plans", sets) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["looked\n"] * 3
    # All have found nothing. One builds, and goes on when it is told to; then the others find its plan.
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda process: (*process.communicate("go on\n"), process.returncode), processes))
    assert [(out.split()[-1], code) for out, _, code in ended] == [("45", 0)] * 3
    assert sum("built, 45 samples of 50 images" in err for _, err, _ in ended) == 1


def test_other_sets_and_choices_have_plans_of_their_own(sets, tmp_path):
    folder = tmp_path / "plans"
    keys = draws(9, range(55))
    others = text_set(tmp_path, keys[:20], "others")
    keep = np.arange(50) < 25
    jobs = [
        ([sets[1]], None),
        ([sets[1]], keep),
        ([sets[1], others], None),
        ([others, sets[1]], None),
        ([others], keep),
    ]
    opened = [cached_plan(folder, sets[0], texts, 3, kept) for texts, kept in jobs]
    assert len({joined.path for joined in opened}) == len(jobs)
    assert [len(joined) for joined in opened] == [45, 25, 50, 50, 0]
    assert cached_plan(folder, sets[0], [sets[1]], 3, np.ones(50, np.bool_)).path not in {one.path for one in opened}


def test_the_plans_opened_longest_ago_go_unless_they_are_in_use(sets, tmp_path):
    folder = tmp_path / "plans"

    def plan(kept):
        return cached_plan(folder, sets[0], [sets[1]], 3, np.arange(50) < kept, max_plans=3)

    first = plan(50)
    used = pickle.loads(pickle.dumps(first))
    for kept in (10, 11, 12):
        plan(kept)
    for age, path in enumerate(sorted(folder.glob("*.plan"), key=lambda path: path.stat().st_mtime_ns)[::-1]):
        os.utime(path, ns=(1, 10**18 - age))
    again = plan(10)  # opened: now the newest
    again.close()
    first.close()
    plan(13)
    left = set(folder.glob("*.plan"))
    assert {used.path, again.path} < left
    assert len(left) == 4  # three, and one in use
    used.close()
    plan(14)
    assert used.path not in set(folder.glob("*.plan"))
    assert len(set(folder.glob("*.plan"))) == 3


def test_a_cached_plan_that_is_damaged_is_built_anew(sets, tmp_path, caplog):
    joined = cached_plan(tmp_path / "plans", sets[0], [sets[1]], 3)
    whole = joined.path.read_bytes()
    joined.path.write_bytes(whole[:-1] + b"\7")
    again = cached_plan(tmp_path / "plans", sets[0], [sets[1]], 3)
    assert again.path.read_bytes() == whole
    assert "damaged: its columns do not fit their checksum" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(sets, tmp_path):
    (tmp_path / "plans").write_text("a file")
    with pytest.raises(JobError, match="plans.*cannot write"):
        cached_plan(tmp_path / "plans", sets[0], [sets[1]], 3)


PINNED = [
    (3, [6, 7, 14, 15], [0, 0, 0, 0]),
    (3, [13, 12, 9, 8], [0, 0, 0, 0]),
    (3, [11, 10, 18, 19], [0, 0, 0, 0]),
    (0, [1, 0, 3, 2], [0, 0, 0, 0]),
    (3, [16, 17, 22, 21], [0, 0, 0, 0]),
    (3, [20, 9, 8, 18], [0, 1, 1, 1]),
    (3, [19, 22, 13, 12], [1, 1, 1, 1]),
    (3, [21, 20, 6, 7], [1, 1, 1, 1]),
]
PINNED_PLACES = [(0, 0), (0, 4), (1, 0), (1, 1), (173913, 1)]
PINNED_FAR = [2, 4, 0, 1]
PINNED_MIX = [(1, 0), (0, 0), (0, 1), (0, 2), (1, 1), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (1, 2), (0, 8)]
PINNED_PLAN = "d1260bc31c86003217e98551aa613a307d044505988469c96b145a6ccabbfd65"
