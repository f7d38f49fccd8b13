"""What a device makes of bytes that the process of a model writes, without such a process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_client.inference import process
from edge_client.inference.process import ModelLimits, ModelProcess
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest

TENSORS = [["x", "tensor(float)", ["batch", 3]]]
READY = json.dumps({"inputs": TENSORS, "outputs": TENSORS}).encode() + b"\n"


class FakeChild:
    """A process that has written ``said`` and ended with a status."""

    def __init__(self, said: bytes, status: int) -> None:
        (_, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        os.close(_)
        os.write(write_out, said[: 1 << 16])
        os.close(write_out)
        self.stdin: IO[bytes] = os.fdopen(write_in, "wb", buffering=0)
        self.stdout: IO[bytes] = os.fdopen(read_out, "rb", buffering=0)
        self._status = status

    def kill(self) -> None:
        """Does nothing: there is no process."""

    def wait(self, timeout: float | None = None) -> int:
        """Returns the status."""
        return self._status


def answer_to(
    manifest: Manifest, said: bytes, status: int, *, ready: bytes = READY
) -> list[AnyArray]:
    """Asks about three inputs, and has a process answer ``said``."""
    started = process.start_child
    fake: Any = lambda of: FakeChild(ready + said, status)  # noqa: E731
    process.start_child = fake
    try:
        with ModelProcess(
            manifest, Path("none"), threads=1, limits=ModelLimits(), input_bytes=0
        ) as asked:
            return asked.ask([np.eye(3, dtype=np.float32)], rows=3)
    finally:
        process.start_child = started
