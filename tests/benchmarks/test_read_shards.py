"""The benchmark of reading: what is timed was compared with what was written, and the limits are held."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch

from benchmarks import layouts, mosaic, ratios, read_shards, readers, samples, turns
from benchmarks.batches import BATCH_SIZE, PLANNED, SEQUENTIAL, check, packed
from benchmarks.turns import BARE, COLD, INT8, MOSAIC, OURS, PACKED, REFERENCE, WARM, WEBDATASET, Turn

COUNT = 2 * BATCH_SIZE + 5  # the tail of five is no batch
ORDERS = (SEQUENTIAL, PLANNED)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the workers have it: more would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made():
    return samples.make(COUNT)


@pytest.fixture(scope="module")
def written(made):
    return made.first(BATCH_SIZE + 5)


@pytest.fixture(scope="module")
def root(written, tmp_path_factory):
    made, root = written, tmp_path_factory.mktemp("layouts")
    made.save(root / turns.SAMPLES)
    layouts.write_images(root / turns.SHARDS / turns.IMAGE_SET, made)
    for codec in turns.CODECS.values():
        layouts.write_texts(root / turns.SHARDS / turns.text_set(codec), made, codec)
    layouts.write_merged(root / turns.MERGED, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "savez_compressed", np.savez)  # a minute of zlib
        layouts.write_files(root / turns.FILES, made, BATCH_SIZE)
    return root


def test_samples_are_alike_in_kind_and_all_different(made, root):
    again = samples.load(root / turns.SAMPLES)
    assert len({made.text(i).tobytes() for i in range(COUNT)}) == COUNT
    for i in (0, len(again) - 1):
        assert made.text(i).shape == (made.num_tokens[i], samples.WIDTH)
        assert np.array_equal(made.padded(i)[: made.num_tokens[i]], again.text(i))
        assert made.number(made.key(i)) == i
    assert 75 < made.num_tokens.mean() < 95
    assert torch.isfinite(packed(made, 0)[1][0]).all()


@pytest.mark.parametrize(
    ("name", "order"),
    [(PACKED, PLANNED), (INT8, PLANNED), *itertools.product((OURS, BARE, WEBDATASET, REFERENCE), ORDERS)],
)
def test_each_reader_gives_what_was_written(name, order, root, written):
    reader, own, expected = turns.open_reader(name, root, written)
    check(name, reader, own, order, expected)
    turn = turns.take_turn(reader, order, COLD, len(own) // BATCH_SIZE)
    assert turn.samples == BATCH_SIZE
    assert turn.wall_s > 0


class Altered:
    """A reader of memory, whose batches are changed by a function."""

    def __init__(self, made, change=lambda batch: batch, starts=(0, BATCH_SIZE)):
        self.made, self.change, self.starts = made, change, starts

    def stream(self, order):
        for start in itertools.cycle(self.starts):
            numbers = range(start, start + BATCH_SIZE)
            moments, texts = zip(*(packed(self.made, i) for i in numbers), strict=True)
            text = torch.cat([parts[0] for parts in texts])
            keys = [self.made.key(i) for i in numbers]
            yield self.change(readers.Batch(keys, torch.stack(moments), [text]))


def flip_a_bit(batch):
    batch.text[0].view(torch.int16)[-1, -1] ^= 1
    return batch


CHANGES = {
    "differs": flip_a_bit,
    "expected torch.bfloat16": lambda batch: batch._replace(text=[batch.text[0].half()]),
    "found torch.bfloat16": lambda batch: batch._replace(text=[batch.text[0].t().contiguous().t()]),
    "128 samples, 64 of them different": None,
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_reader_that_errs_is_not_timed(message, made):
    check("memory", Altered(made), made, SEQUENTIAL, lambda i: packed(made, i))
    reader = Altered(made, CHANGES[message]) if CHANGES[message] else Altered(made, starts=(0, 0))
    with pytest.raises(ValueError, match=message):
        check("memory", reader, made, SEQUENTIAL, lambda i: packed(made, i))


def test_a_reader_that_does_not_shuffle_has_no_planned_order(made):
    with pytest.raises(ValueError, match="another order"):
        check("memory", Altered(made), made, PLANNED, lambda i: packed(made, i))


def turn(wall_s, cpu_s):
    return Turn(100, wall_s, cpu_s, 0)


def test_a_ratio_is_the_median_over_rounds_by_each_clock():
    own = {
        OURS: [turn(1, 2), turn(1, 2), turn(1, 2)],
        MOSAIC: [turn(9, 5), turn(4, 5), turn(5, 5)],
        BARE: [turn(1, 1), turn(1, 1), turn(2, 1)],
    }
    of_mosaic, of_bare = ratios.speeds({(WARM, PLANNED): own})
    assert of_mosaic.ratios == {"wall": (5, 4, 9), "CPU": (2.5, 2.5, 2.5)}
    assert of_mosaic.ceiling == {"wall": 4, "CPU": 5}
    assert (of_mosaic.verdict, of_mosaic.missed) == ("PASS", False)
    assert of_bare.ratios["wall"] == (1, 1, 2)
    assert of_bare.ceiling == {}


@pytest.mark.parametrize(("peer", "limit"), ratios.FASTER_THAN.items())
@pytest.mark.parametrize(
    ("wall", "cpu", "bare", "verdict"),
    [(1.01, 0.9, 0.5, "PASS"), (0.99, 1.1, 1.01, "MISSED"), (0.99, 1.1, 0.98, "DISK")],
)
def test_a_limit_just_reached_holds_and_one_just_missed_does_not(peer, limit, wall, cpu, bare, verdict):
    own = {OURS: [turn(1, 1)], peer: [turn(limit * wall, limit * cpu)]}
    if peer != BARE:
        own[BARE] = [turn(wall / bare, 1)]
    speed = next(one for one in ratios.speeds({(COLD, SEQUENTIAL): own}) if f": {peer}," in one.what)
    expected = "MISSED" if peer == BARE and verdict == "DISK" else verdict
    assert (speed.verdict, speed.missed) == (expected, expected == "MISSED")
    assert expected in ratios.speed_table([speed]).split()


def test_sizes_are_held_against_the_reference_and_every_peer():
    zstd = f"{MOSAIC}, zstd"
    bytes_per_sample = {OURS: 700_000, PACKED: 550_000, WEBDATASET: 710_000, zstd: 540_000, REFERENCE: 980_000}
    found = {size.what: size.missed for size in ratios.sizes(bytes_per_sample)}
    assert found == {
        "ours : reference, raw": False,
        "ours-packed : webdataset": False,
        "ours-packed : mosaic, zstd": True,
        "ours-packed : reference": False,
    }
    assert ratios.sizes(bytes_per_sample | {OURS: 720_000})[0].missed


def test_a_worker_takes_turns_in_a_process_of_its_own(root):
    with turns.Worker(BARE, root, sys.executable) as worker:
        worker.wait()
        warm = worker.take_turn(PLANNED, WARM)
    assert warm.samples % BATCH_SIZE == 0
    assert warm.from_disk_bytes == 0
    assert worker.size_bytes > BATCH_SIZE * 500_000


def test_a_worker_that_cannot_open_its_reader_is_named(tmp_path):
    with (
        turns.Worker(BARE, tmp_path, sys.executable) as worker,
        pytest.raises(RuntimeError, match="pread: the process"),
    ):
        worker.wait()


class Fake:
    """A worker whose bytes all come from the disk."""

    name, root, size_bytes = OURS, "folder", 1000

    def take_turn(self, order, cache):
        return Turn(64, 1, 1, self.size_bytes)


def test_a_turn_from_the_wrong_cache_does_not_count():
    assert read_shards._take_turn(Fake(), PLANNED, COLD).from_disk_bytes == 1000
    with pytest.raises(
        RuntimeError, match="expected a warm cache, found 100% of the bytes read from the disk, 3 times"
    ):
        read_shards._take_turn(Fake(), PLANNED, WARM)


def test_the_stand_in_is_for_one_library_only():
    finder = mosaic._StandIn()
    module = importlib.util.module_from_spec(finder.find_spec("torchvision.datasets", None))
    assert isinstance(module.VisionDataset, type)
    assert not hasattr(module, "__file__")
    assert finder.find_spec("torchvisions", None) is None
    assert finder.find_spec("numpy", None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nowhere/python"], "expected a Python that has benchmarks/peers.txt, found no nowhere/python"),
        (["--samples", "100"], "expected at least two batches of 64, got 100"),
        (["--without", "mosaic", "--samples", "1000000000"], "choose another folder or fewer --samples"),
        (["--without", "ours"], "invalid choice: 'ours'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["read_shards", *arguments])
    with pytest.raises(SystemExit) as stop:
        read_shards.main()
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_pin_is_exact():
    lines = (read_shards.PEERS.parents[2] / "benchmarks/peers.txt").read_text().splitlines()
    assert all("==" in line for line in lines if not line.startswith("#"))
