import pytest
import torch

from pixart_data.errors import ConfigError
from pixart_model.devices import resolve_device, resolve_dtype


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


def test_the_type_follows_the_device_unless_it_is_named():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [resolve_dtype("auto", d) for d in (cpu, gpu)] == [torch.float32, torch.bfloat16]
    assert [resolve_dtype("bf16", cpu), resolve_dtype("fp32", gpu)] == [torch.bfloat16, torch.float32]
