"""How tests ask a live server, and wait for what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fedcore.errors import ResourceError
from server.live.operators.client import ask_local


def status(project: Any) -> dict[str, Any]:
    return ask_local(project.root / "server", {"verb": "status"})


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while True:
        with suppress(ResourceError):  # a server that is on its way up
            if condition():
                return
        assert time.monotonic() < end
        time.sleep(0.02)
