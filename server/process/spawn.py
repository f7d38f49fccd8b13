"""Starting processes from a program that is somebody else's: a script or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def script_left_out() -> Iterator[None]:
    """Has processes that are spawned inside not run the main script once more.

    `multiprocessing` runs it in each of them, for what the script defines and sends them, so that a
    script that simulates as it is run would simulate again there. What fedcore sends is its own.
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
