"""What several processes that run the same command say, and which of them says it."""

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from jobs import ranks
from jobs.train import train
from tests.model.conftest import _own_cache, features, make_job  # noqa: F401 - fixtures


@pytest.fixture
def be(monkeypatch):
    """Be one of two processes of a `torchrun` whose store this test holds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))

    def become(rank, uses_store=True):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(uses_store))
        return store

    return become


def test_alone_it_speaks_for_all(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.is_first()
    assert not ranks.is_one_of_several()
    assert ranks.is_ours_to_say("anything")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.is_first(), "one process is no several"


def test_what_all_have_to_say_the_first_says(be, monkeypatch):
    be(0)
    assert ranks.is_ours_to_say("job.toml: wrong")
    be(1)
    assert ranks.rank() == 1
    assert not ranks.is_ours_to_say("job.toml: wrong")
    monkeypatch.setattr(ranks, "_WAIT_S", 0.2)
    assert ranks.is_ours_to_say("a shard that only this machine cannot read")


def test_the_others_wait_for_the_first_one_s_word(be):
    be(1)
    heard = []
    waiting = threading.Thread(target=lambda: heard.append(ranks.is_ours_to_say("slow")))
    waiting.start()
    waiting.join(0.3)
    assert heard == []
    be(0)
    assert ranks.is_ours_to_say("slow")
    waiting.join(5)
    assert heard == [False]


def test_where_nobody_can_be_asked_it_speaks(be, monkeypatch):
    be(1, uses_store=False)
    assert ranks.is_ours_to_say("anything")
    be(1)
    monkeypatch.setattr(ranks, "_WAIT_S", 0.2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        monkeypatch.setenv("MASTER_PORT", str(closed.getsockname()[1]))
        assert ranks.is_ours_to_say("anything")


SAY = """
import logging
from pixart_data.logs import talk
talk(["pixart_model"], "train", {verbose}, {as_json}, rank={rank})
log = logging.getLogger("pixart_model.train")
log.info("a step")
log.debug("details")
log.warning("too hot")
"""


def said(rank, verbose=False, as_json=False):
    code = SAY.format(rank=rank, verbose=verbose, as_json=as_json)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_the_first_process_talks_and_the_others_warn():
    assert [line[20:] for line in said(0)] == ["a step", "too hot"]
    assert [line[20:] for line in said(3)] == ["[rank 3] too hot"]
    assert [line[20:] for line in said(3, verbose=True)] == [
        "[rank 3] a step", "[rank 3] details", "[rank 3] too hot",
    ]  # fmt: skip


def test_lines_for_machines_name_the_process_too():
    [line] = map(json.loads, said(3, as_json=True))
    assert (line["rank"], line["message"]) == (3, "too hot")
    assert all("rank" not in json.loads(line) for line in said(0, as_json=True))


def test_an_error_of_one_process_is_marked(tmp_path):
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "jobs.cli", "train", str(tmp_path / "no.toml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("[rank 1] pixart train: ")
    assert "no such job file" in line


def test_a_plan_is_printed_once(be, make_job, capsys):  # noqa: F811
    job = make_job(data={"batches_per_step": 2})
    be(1)
    train(job, dry_run=True)
    assert capsys.readouterr().out == ""
    be(0)
    train(job, dry_run=True)
    assert "train: " in capsys.readouterr().out
