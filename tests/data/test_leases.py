"""The lease on an output: one holder, on a local disk and on a real S3-compatible server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pixart_data import leases
from pixart_data.errors import JobError
from pixart_data.leases import output_lock
from pixart_data.storage import list_files, location, read_bytes, write_atomic

HOLDER = """
import sys, time
from pixart_data.leases import output_lock
from pixart_data.storage import location
with output_lock(location(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return tmp_path / "out"
    return location(f"{request.getfixturevalue('bucket')}/out")


@pytest.fixture
def holder(root):
    """Another process that holds the lease of `root`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def claim_elsewhere(root, number, beat=0, released=False):
    """What a run on another machine would have written."""
    fields = {"token": "t", "process": "far-away.17.4711", "beat": beat, "released": released}
    write_atomic(root / f".lease/{number:06d}.json", json.dumps(fields).encode())


def test_a_second_run_is_refused_and_a_killed_one_followed_at_once(holder, root):
    with pytest.raises(JobError, match="out: another run is writing here .*; wait for it, or choose another output"):
        leases.output_lock(root).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started_s = time.monotonic()
    with output_lock(root):
        assert time.monotonic() - started_s < 5
        assert [path.name for path in list_files(root / ".lease")] == ["000002.json"]


def test_what_a_holder_was_writing_when_it_was_killed_is_deleted(tmp_path):
    (tmp_path / "out/.lease").mkdir(parents=True)
    (tmp_path / "out/.lease/.tmp-killed").write_text('{"token": ')
    with output_lock(tmp_path / "out"):
        assert [path.name for path in list_files(tmp_path / "out/.lease")] == ["000001.json"]


def test_a_stopped_run_stays_the_holder(holder, root):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(JobError, match="another run is writing here"):
        leases.output_lock(root).__enter__()
    holder.send_signal(signal.SIGCONT)


def test_it_is_let_go_of_also_after_an_error(root):
    with pytest.raises(RuntimeError, match="mine"), output_lock(root):
        raise RuntimeError("mine")
    with output_lock(root), pytest.raises(JobError, match="another run"), output_lock(root):
        pass
    with output_lock(root) as lease:
        lease.check()
    assert json.loads(read_bytes(list_files(root / ".lease")[-1]))["released"]


def test_a_run_elsewhere_that_shows_life_is_left_alone(root, monkeypatch):
    monkeypatch.setattr(leases, "_POLL_S", 0.1)
    claim_elsewhere(root, 1)
    timer = threading.Timer(0.5, claim_elsewhere, (root, 1, 1))
    timer.start()
    with pytest.raises(JobError, match="another run is writing here"):
        leases.output_lock(root).__enter__()
    timer.join()


def test_a_run_elsewhere_without_life_is_followed_after_a_while(root, monkeypatch):
    monkeypatch.setattr(leases, "_POLL_S", 0.1)
    monkeypatch.setattr(leases, "EXPIRE_S", 1.5)
    claim_elsewhere(root, 41)
    started_s = time.monotonic()
    with output_lock(root):
        assert time.monotonic() - started_s > 1.4
        assert [path.name for path in list_files(root / ".lease")] == ["000042.json"]


def test_a_released_lease_is_taken_at_once(root):
    claim_elsewhere(root, 3, released=True)
    with output_lock(root):
        assert [path.name for path in list_files(root / ".lease")] == ["000004.json"]


def test_it_is_let_go_of_on_a_full_disk_too(tmp_path, monkeypatch):
    def full(path, data):
        raise JobError(f"{path}: cannot write: the disk is full")

    with output_lock(tmp_path):
        monkeypatch.setattr(leases, "write_atomic", full)
    with output_lock(tmp_path) as lease:
        assert lease.number == 2


def test_a_holder_that_was_overtaken_stops_before_it_commits(root, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.1)
    with output_lock(root) as lease:
        claim_elsewhere(root, 2)
        deadline_s = time.monotonic() + 10
        with pytest.raises(JobError, match="this run stops, another run has taken over"):  # noqa: PT012
            while time.monotonic() < deadline_s:
                lease.check()
                time.sleep(0.05)
    assert [path.name for path in list_files(root / ".lease")] == ["000001.json", "000002.json"]
    assert not json.loads(read_bytes(root / ".lease/000002.json"))["released"]


def test_a_holder_that_slept_looks_before_it_commits(root, monkeypatch):
    """Renewed last long ago, as after a machine's sleep: it must not trust that it still holds the lease."""
    with output_lock(root) as lease:
        claim_elsewhere(root, 2)
        lease.check()  # no reason to look yet
        monkeypatch.setattr(lease, "_renewed_s", time.monotonic() - leases.EXPIRE_S)
        with pytest.raises(JobError, match="another run has taken over"):
            lease.check()


def test_a_lease_that_cannot_be_renewed_is_not_relied_on(tmp_path, monkeypatch):
    root = tmp_path / "out"
    with output_lock(root) as lease:
        monkeypatch.setattr(lease, "_renewed_s", time.monotonic() - leases.EXPIRE_S)

        def fail(*_):
            raise JobError("the store is away")

        monkeypatch.setattr(leases, "write_atomic", fail)
        with pytest.raises(JobError, match="its lease could not be renewed; run the same command again"):
            lease.check()


def test_many_runs_that_start_at_once_are_one(root):
    held, refused = [], []
    barrier = threading.Barrier(6)

    def start():
        barrier.wait()
        try:
            with output_lock(root):
                held.append(1)
                assert len(held) == 1
                time.sleep(1.0)
        except JobError:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_a_damaged_lease_is_nobodys(root):
    write_atomic(root / ".lease/000001.json", b"{")
    with output_lock(root):
        pass


def test_the_name_of_a_process_is_its_own():
    from pixart_data.processes import is_alive, process_name

    assert is_alive(process_name())
    machine, number, started = process_name().rsplit(".", 2)
    assert not is_alive(f"{machine}.{number}.{int(started) + 1}")  # the number was given again
    assert not is_alive(f"{machine}.{2**22 + 5}.{started}")
    assert is_alive("elsewhere.1.1")
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(f"{machine}.{child.pid}.{started}")  # a corpse
    child.wait()
