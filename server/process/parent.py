"""Ends a process when its parent dies."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl.h


def die_with_parent() -> None:
    """Makes the kernel kill this process with SIGKILL when its parent dies.

    Works on Linux only; does nothing elsewhere. Also covers a parent that died before this call.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)
