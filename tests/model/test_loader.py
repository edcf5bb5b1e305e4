import itertools
import os
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pixart_data.errors import DataError
from pixart_model.buffers import Buffers, bytes_of
from pixart_model.config import Data
from pixart_model.dataset import open_dataset
from pixart_model.loader import read_ahead
from tests.model.conftest import damage

CPU = torch.device("cpu")


@pytest.fixture
def dataset(features):
    opened = open_dataset(Data(features=str(features), batch_size=4), seed=3)
    yield opened
    opened.close()


def told(batches):
    return [
        (b.step, b.keys, b.moments.tolist(), [part.view(torch.uint8).tolist() for c in b.texts for part in c.parts])
        for b in batches
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize(("num_workers", "context"), [(0, None), (1, "fork"), (3, "fork"), (1, "spawn")])
def test_workers_give_the_same_batches_in_the_same_order(dataset, num_workers, context):
    dataset.read(2)  # shards are open here already
    loader = DataLoader(
        dataset.view(), sampler=range(2, 9), batch_size=None, num_workers=num_workers, multiprocessing_context=context
    )
    batches = list(loader)
    assert told(batches) == told(dataset.read(i) for i in range(2, 9))
    padded = dataset.read(2).to(CPU)
    assert torch.equal(batches[0].to(CPU).text, padded.text)
    assert batches[0].to(CPU).keys == padded.keys


def test_a_worker_says_which_samples_it_skipped(copy):
    damage(copy / "text", "source/007")
    opened = open_dataset(Data(features=str(copy), batch_size=4, damaged="skip"))
    batches = list(DataLoader(opened.view(), sampler=range(8), batch_size=None, num_workers=1))
    assert {key for batch in batches for key in batch.skipped} == {"source/007"}
    assert "source/007" not in {key for batch in batches for key in batch.keys}
    opened.close()


def test_batches_come_in_order_whoever_is_first_and_so_many_are_read_ahead(dataset):
    blocked, begun, located = threading.Event(), [], []

    def read(number, place, memory):
        begun.append(number)
        if number == 0:
            blocked.wait(30)
        return dataset.read(number)

    def locate(number):
        located.append(number)
        return number

    batches = read_ahead(itertools.count(), locate, read, num_threads=2, num_prefetch=3)
    taker = threading.Thread(target=lambda: next(batches), daemon=True)
    taker.start()
    while len(begun) < 6:  # the other thread reads on while batch 0 is waited for
        taker.join(0.001)
    blocked.set()
    taker.join()
    assert [next(batches).step for _ in range(5)] == [1, 2, 3, 4, 5]
    assert sorted(begun)[:6] == list(range(6))
    assert len(begun) <= 11, "six at a time have memory; the sixth batch is with the caller"
    assert located == sorted(located)
    assert len(located) <= len(begun) + 3 + 2
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_iterators_that_are_closed_leave_no_file_open(dataset):
    def num_open():
        shards = [path for one in (dataset.images, dataset.mixture.main) for path in one.root.rglob("*.tar")]
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(str(path) in links for path in shards)

    for _ in range(3):
        batches = dataset.batches()
        for _ in range(8):
            next(batches)
        assert num_open() > 2
        batches.close()
        assert num_open() == 0


def test_an_error_comes_at_its_turn(dataset):
    def read(number, place, memory):
        if number == 4:
            raise DataError("batch 4")
        return dataset.read(number)

    batches = read_ahead(itertools.count(2), lambda number: None, read, 2, 3)
    assert [next(batches).step for _ in range(2)] == [2, 3]
    with pytest.raises(DataError, match="batch 4"):
        next(batches)


def test_memory_is_not_read_into_before_a_device_has_copied_it(dataset, monkeypatch):
    happened = []

    class Event:
        def record(self, stream):
            self.name = f"copy {len(happened)}"
            happened.append(self.name)

        def synchronize(self):
            happened.append(f"waited for {self.name}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def read(number, place, memory):
        happened.append(number)
        return dataset.portions[0].read(number, dataset.portions[0].locate(number), memory)

    batches = read_ahead(itertools.count(), lambda number: None, read, num_threads=1, num_prefetch=1)
    next(batches)._buffers.guard(torch.device("cuda"))  # as `to` does there
    copy = next(name for name in happened if isinstance(name, str))
    while f"waited for {copy}" not in happened:
        next(batches)
    assert happened.index(f"waited for {copy}") == happened.index(3) - 1, "the fourth batch has the first one's memory"
    batches.close()


def test_threads_read_with_the_gpu_of_who_asks(monkeypatch):
    given, read = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: given.append((threading.current_thread().name, device))
    )

    def note(number, *_):
        read.append((threading.current_thread().name, 2))
        return number

    batches = read_ahead(itertools.count(), note, note, num_threads=2, num_prefetch=1, pinned=True)
    assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
    batches.close()
    assert read
    assert set(read) <= set(given), "before it reads"


def test_memory_grows_and_is_kept():
    memory = Buffers()
    small = memory.take("one", torch.int16, (3, 2))
    bytes_of(small)[:] = bytes(range(12))
    assert small[0, 0] == 0x0100
    assert memory.take("one", torch.uint8, (12,)).tolist() == list(range(12))
    large = memory.take("one", torch.float32, (100,))
    assert memory.take("one", torch.uint8, (430,)).data_ptr() == large.data_ptr(), "grown by an eighth more"
    assert memory.take("other", torch.uint8, (0, 3)).shape == (0, 3)
    assert len(bytes_of(memory.take("none", torch.int16, (0, 3)))) == 0
