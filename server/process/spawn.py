"""Spawning of processes from a user's script or notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def main_script_hidden() -> Iterator[None]:
    """Keeps spawned processes from running the main script again.

    `multiprocessing` reruns the main script in each process, to find what it defines; a script that
    calls `simulate` at top level would simulate again there. fedcore's processes need nothing from
    the script.
    """
    script = sys.modules["__main__"]
    spec, file = script.__spec__, getattr(script, "__file__", None)
    script.__spec__ = None
    if file is not None:
        del script.__file__
    try:
        yield
    finally:
        script.__spec__ = spec
        if file is not None:
            script.__file__ = file
