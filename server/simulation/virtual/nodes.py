"""Virtual nodes: how they are numbered, what one keeps, and the thread that computes for them."""

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
    """Computes in one thread.

    Models and batches of clients are small, and a pool of threads costs them more than it gives
    (five times the time on a busy machine).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def context_of(node_id: int, name: str) -> Context:
    """What a node of that name keeps, before its first message."""
    return Context(
        run_id=RUN_ID,
        node_id=node_id,
        node_config={"client": name},
        state=RecordDict(),
        run_config={},
    )
