"""Batches for a device, gathered ahead by a thread while the device computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from fedcore.task.definition import Examples
from fedcore.training.batches import gather

Batch = tuple[Tensor, Tensor]
_END_S = 0.1


def loaded(
    examples: Examples, parts: Iterable[Tensor], device: torch.device, *, ahead: int
) -> Generator[Batch, None, None]:
    """Yields the inputs and targets of each part on the device.

    Args:
        examples: Where the rows come from.
        parts: Rows of each batch.
        device: The device. For a GPU, memory is pinned, and copies overlap with computation.
        ahead: How many batches are gathered before they are needed, by a thread of their own; 0
            gathers each when it is needed.

    Raises:
        DataError: an example cannot be read, also if the thread reads it.
    """
    if not ahead:
        for rows in parts:
            inputs, targets = gather(examples, rows)
            yield inputs.to(device), targets.to(device)
        return
    for inputs, targets in _ahead(examples, parts, device.type == "cuda", ahead):
        yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _ahead(
    examples: Examples, parts: Iterable[Tensor], pinned: bool, ahead: int
) -> Generator[Batch, None, None]:
    ready = queue.Queue[Batch | Exception | None](maxsize=ahead)
    ended = threading.Event()

    def put(one: Batch | Exception | None) -> None:
        while not ended.is_set():
            with suppress(queue.Full):
                ready.put(one, timeout=_END_S)
                return

    def read() -> None:
        try:
            for rows in parts:
                if ended.is_set():
                    return
                inputs, targets = gather(examples, rows)
                put((inputs.pin_memory(), targets.pin_memory()) if pinned else (inputs, targets))
        except Exception as error:  # the task's code may raise anything: the consumer raises it
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=read, name="fedcore-batches", daemon=True)
    thread.start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        ended.set()
        thread.join()
