"""Virtual nodes: their ids and Flower contexts, and the thread setting of their computations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from flwr.app import Context, RecordDict

from fedcore.flower.identity import SERVER_NODE_ID

RUN_ID = 1
FIRST_NODE_ID = SERVER_NODE_ID + 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread within the block.

    Clients' models and batches are small: a thread pool costs more than it gains (five times the
    duration on a busy machine).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def context_of(node_id: int, name: str) -> Context:
    """Returns a node's Flower context before its first message."""
    return Context(
        run_id=RUN_ID,
        node_id=node_id,
        node_config={"client": name},
        state=RecordDict(),
        run_config={},
    )
