from __future__ import annotations

import os
import signal
import threading

import pytest

from server.interrupt import asked_to_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with asked_to_stop(lambda: said.append("stopping")) as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert said == ["stopping"]
    assert signal.getsignal(number) is before


def test_in_another_thread_nothing_is_changed() -> None:
    found: list[object] = []

    def run() -> None:
        with asked_to_stop(lambda: None) as stopping:
            found.extend([stopping(), signal.getsignal(signal.SIGINT)])

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, before]
