"""What a signal does to a device, by what it is at."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from fedcore.errors import INTERRUPTED

PROGRAM = """
import os, signal, sys, threading
from edge_client.agent.stopping import stop_on_signals
loading = threading.Event()
if sys.argv[1] == "loading":
    loading.set()
with stop_on_signals(loading) as told:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted", told())
"""


@pytest.mark.parametrize(("at", "told"), [("loading", ""), ("work", "interrupted True\n")])
def test_what_is_being_loaded_is_not_interrupted_but_ended(at: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, at], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")


HELD = """
import ctypes, threading
from edge_client.agent.stopping import stop_on_signals
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
with stop_on_signals(threading.Event()):
    print("held", flush=True)
    while True:  # the second time, a call that never returns, and that no signal ends
        library.pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of another size")
@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, INTERRUPTED)])
def test_a_call_that_lets_no_handler_run_does_not_keep_a_device(signals: int, code: int) -> None:
    """A server chooses how many examples are in a step, and a step can be a single such call."""
    with subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE) as held:
        try:
            assert held.stdout is not None
            assert held.stdout.readline() == b"held\n"
            for _ in range(signals):
                time.sleep(0.3)
                held.send_signal(signal.SIGTERM)
            assert held.wait(timeout=15) == code
        finally:
            held.kill()
