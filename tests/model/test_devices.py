import logging
import threading

import pytest
import torch

from pixart_data.errors import ConfigError
from pixart_model import devices
from pixart_model.devices import follow, resolve_device, resolve_dtype
from pixart_model.parallel import World
from pixart_model.savers import Saver

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Say which GPU there is."""

    def have(name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    devices._tell.cache_clear()
    return have


@pytest.mark.parametrize("available", [True, False])
def test_the_device_is_what_there_is(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if available else "cpu")
    if available:
        assert resolve_device("cuda").type == "cuda"
    else:
        with pytest.raises(ConfigError, match="expected a GPU that torch can use, found none"):
            resolve_device("cuda")


def test_the_type_follows_the_device_unless_it_is_named(gpu, caplog):
    caplog.set_level(logging.INFO)
    gpu("NVIDIA A100", (8, 0))
    assert [resolve_dtype("auto", d) for d in (CPU, GPU)] == [torch.float32, torch.bfloat16]
    assert [resolve_dtype("bf16", d) for d in (CPU, GPU)] == [torch.bfloat16] * 2
    assert resolve_dtype("fp32", GPU) == torch.float32
    assert not caplog.text


def test_a_gpu_from_before_bf16_computes_in_fp32_and_says_so_once(gpu, caplog):
    caplog.set_level(logging.INFO)
    gpu("Tesla V100", (7, 0))
    assert [resolve_dtype(dtype, GPU) for dtype in ("fp32", "auto", "auto")] == [torch.float32] * 3
    assert caplog.messages == ["Tesla V100 (7.0): does not compute in bf16; with dtype = 'auto' this is fp32"]
    with pytest.raises(ConfigError, match=r"dtype: expected a GPU that computes in bf16, .* found Tesla V100 \(7.0\)"):
        resolve_dtype("bf16", GPU)


def test_threads_follow_to_the_gpu_of_who_starts_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3 if threading.current_thread() is here else 0)
    here, given = threading.current_thread(), []
    monkeypatch.setattr(torch.cuda, "set_device", given.append)
    thread = threading.Thread(target=follow(GPU))
    thread.start()
    thread.join()
    assert given == [3]
    follow(CPU)()
    assert given == [3]


def test_checkpoints_are_written_with_the_gpu_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    given = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.append((threading.get_ident(), device)))
    saver = Saver(tmp_path, 1, World(0, 1, GPU))
    assert given == [(saver._thread.submit(threading.get_ident).result(), 3)]
    saver.close()
