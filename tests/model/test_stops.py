import contextlib
import logging
import os
import signal
from pathlib import Path

import pytest
import torch

from pixart_data.errors import JobError
from pixart_model.parallel import World
from pixart_model.stops import FILE, Stops, Wish, heeded

ONE, SECOND = (World(rank, 1, torch.device("cpu")) for rank in (0, 1))


@pytest.fixture
def looking(monkeypatch):
    """Have something happen while the file is looked for."""

    def arrange(happen):
        real = Path.exists

        def exists(self, **options):
            found = real(self, **options)
            if self.name == FILE:
                happen()
            return found

        monkeypatch.setattr(Path, "exists", exists)

    return arrange


@pytest.mark.parametrize(
    ("number", "wish"), [(signal.SIGTERM, Wish.LEAVE), (signal.SIGINT, Wish.INTERRUPT)], ids=["SIGTERM", "Ctrl-C"]
)
@pytest.mark.parametrize("is_filed", [False, True])
def test_a_signal_that_comes_while_the_file_is_looked_for_is_not_lost(tmp_path, looking, number, wish, is_filed):
    with heeded(tmp_path, ONE) as stops:
        if is_filed:
            (tmp_path / FILE).touch()
        sent = []

        def once():
            if not sent:
                sent.append(number)
                os.kill(os.getpid(), number)

        looking(once)
        assert stops.asked() == wish
        assert sent == [number]
        assert stops.asked() == wish, "and is not forgotten"


def test_nobody_asks_somebody_asks_by_the_file_and_only_the_first_process_looks(tmp_path):
    first, second = (Stops(tmp_path, world) for world in (ONE, SECOND))
    assert [first.asked(), second.asked()] == [Wish.GO_ON, Wish.GO_ON]
    (tmp_path / FILE).touch()
    assert [first.asked(), second.asked()] == [Wish.LEAVE, Wish.GO_ON]
    assert [second.forget(), (tmp_path / FILE).exists()] == [False, True]
    assert [first.forget(), first.forget(), (tmp_path / FILE).exists()] == [True, False, False]
    assert first.asked() == Wish.GO_ON


def test_a_storage_that_does_not_answer_is_no_reason_to_leave(tmp_path, looking):
    def fail():
        raise OSError(5, "Input/output error")

    (tmp_path / FILE).touch()
    looking(fail)
    stops = Stops(tmp_path, ONE)
    assert stops.asked() == Wish.GO_ON
    stops.hear(signal.SIGTERM, None)
    assert stops.asked() == Wish.LEAVE


def test_the_file_of_an_earlier_run_is_taken_away_and_that_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), heeded(tmp_path, ONE) as stops:
        assert stops.asked() == Wish.GO_ON
    assert not caplog.text
    (tmp_path / FILE).touch()
    with caplog.at_level(logging.WARNING), heeded(tmp_path, ONE) as stops:
        assert stops.asked() == Wish.GO_ON
    assert f"{tmp_path / FILE}: removed: it was there before this run began" in caplog.text


def test_what_cannot_be_taken_away_is_an_error_and_signals_stay_as_they_were(tmp_path):
    (tmp_path / FILE).mkdir()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(JobError, match=FILE), heeded(tmp_path, ONE):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_of_several_signals_the_strongest_counts_and_a_second_ctrl_c_goes_at_once(tmp_path):
    with contextlib.ExitStack() as stack:
        stops = stack.enter_context(heeded(tmp_path, ONE))
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stops.asked() == Wish.INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
