import logging
import socket
import time

import pytest

from jobs import nodes
from pixart_data.errors import JobError


def node(alive=True, **resources):
    return {"Alive": alive, "Resources": resources}


def joining(*lists):
    """Nodes as Ray would list them, one list for each time it is asked; the last one stays."""
    left = list(lists)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(nodes, "_POLL_S", 0.01)


def test_it_waits_until_all_have_joined(caplog):
    caplog.set_level(logging.INFO, "jobs.nodes")
    gpu = node(CPU=8, GPU=8)
    assert nodes.wait(2, 8, 10, 2, joining([], [gpu], [gpu], [gpu, gpu])) == 2
    assert [record.message for record in caplog.records] == [f"nodes: {n} of 2 have joined" for n in (0, 1, 2)]


def test_only_living_nodes_with_enough_gpus_count():
    listed = [node(CPU=8, GPU=8), node(CPU=8, GPU=4), node(CPU=8), node(alive=False, CPU=8, GPU=8)]
    with pytest.raises(
        JobError, match="expected 2 nodes with 8 GPUs, found 1 after 0 s; .* ask for fewer with --nodes"
    ):
        nodes.wait(2, 8, 0, 2, lambda: listed)


def test_a_head_that_only_directs_does_not_count():
    with pytest.raises(JobError, match="expected 2 nodes, found 1"):
        nodes.wait(2, 0, 0, 2, lambda: [node(), node(CPU=0.0), node(CPU=4)])


def test_with_fewer_it_goes_on_when_told_so(caplog):
    assert nodes.wait(8, 8, 0, 1, lambda: [node(CPU=8, GPU=8)] * 3) == 3
    assert "going on with 3 of 8 nodes with 8 GPUs" in caplog.text


def test_nobody_at_the_address_is_one_line_in_time(monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        started_s = time.monotonic()
        assert nodes.main(["1", "--timeout-s", "0.2"]) == 4
    assert time.monotonic() - started_s < 10
    assert "expected a Ray head to answer within 0.2 s" in capsys.readouterr().err


def test_an_address_is_needed(monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert nodes.main(["1"]) == 4
    assert "RAY_ADDRESS: expected HOST:PORT of a running head, found ''" in capsys.readouterr().err
