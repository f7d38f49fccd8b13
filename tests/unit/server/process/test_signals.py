from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from server.process.signals import signals_blocked, stop_requested, unblock_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with stop_requested(lambda: said.append("stopping")) as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert said == ["stopping"]
    assert signal.getsignal(number) is before


def test_one_that_insists_where_nothing_can_be_raised_comes_again() -> None:
    class Freed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with stop_requested(lambda: None):
        Freed()
        Freed()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)


def test_what_else_cannot_be_raised_is_told_as_before() -> None:
    class Freed:
        def __del__(self) -> None:
            raise ValueError("not here")

    told: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda lost: told.append(lost.exc_type)
    try:
        with stop_requested(lambda: None):
            Freed()
        Freed()
    finally:
        sys.unraisablehook = before
    assert told == [ValueError, ValueError]


def test_a_process_hears_of_signals_once_it_lets_them_through() -> None:
    read, write = os.pipe()
    with stop_requested(lambda: None) as stopping:
        with signals_blocked():
            child = os.fork()
            if not child:
                os.kill(os.getpid(), signal.SIGTERM)  # would ask this process's copy to stop
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.write(write, b"n" if not stopping() else b"y")
                unblock_signals()
                os._exit(0)
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # others let it through
            assert not stopping()
        assert stopping()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert os.read(read, 1) == b"n"
    os.close(read)
    os.close(write)


def test_in_another_thread_nothing_is_changed() -> None:
    found: list[object] = []

    def run() -> None:
        with stop_requested(lambda: None) as stopping:
            found.extend([stopping(), signal.getsignal(signal.SIGINT)])

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, before]
