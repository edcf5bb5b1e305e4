"""SIGTERM and a main thread that never comes back from a call."""

import signal
import subprocess
import sys
import time

import pytest

CODE = """
import signal, sys, threading
from pipelines.ending import exit_in_time
told = threading.Event()
with exit_in_time(float(sys.argv[1])):
    if sys.argv[2] != "raises":
        signal.signal(signal.SIGTERM, lambda *_: told.set())
    print("ready", flush=True)
    if sys.argv[2] == "hangs":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    else:
        told.wait()
print("in order", flush=True)
"""


@pytest.fixture
def start():
    processes = []

    def run(*words):
        command = [sys.executable, "-c", CODE, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_a_call_that_never_returns_is_ended(start):
    process = start("1.5", "hangs")
    began_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # impatience does not shorten it
    assert process.wait(20) == 4
    assert 1.3 < time.monotonic() - began_s < 10
    assert "Ray did not answer in time; run the same command again" in process.stderr.read()


def test_what_ends_by_itself_is_left_alone(start):
    process = start("1.0", "ends")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stdout.read().endswith("in order\n")


def test_outside_of_the_pool_it_is_stopped_at_once(start):
    """As while an index is made: Ray's own handler would leave with code 15 and no word."""
    process = start("20", "raises")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    assert "pipelines.ending.Stopped: stopped by SIGTERM; run the same command again" in process.stderr.read()
