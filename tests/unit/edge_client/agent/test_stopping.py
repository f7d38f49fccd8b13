"""What a signal does to a device, by what it is at."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, threading
from edge_client.agent.stopping import told_to_stop
loading = threading.Event()
if sys.argv[1] == "loading":
    loading.set()
with told_to_stop(loading) as told:
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
