"""Runs a ServerApp and a ClientApp in this process, one virtual client after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import SERVER_NODE_ID, assume_identity
from fedcore.updates.messages import REFUSED

Together = Callable[[Sequence[str], Sequence[Message]], Iterator[Message]]
"""Answers a round's training messages, given whom each is for."""

_RUN_ID = 1
_FIRST_NODE_ID = SERVER_NODE_ID + 1


@dataclass(frozen=True)
class Simulation:
    """What is left of the virtual clients: each one's own state, by its name."""

    contexts: Mapping[str, Context]
    rounds: Mapping[str, int]
    """How often each client was asked to train."""


def simulate(
    server: ServerApp,
    client: ClientApp,
    clients: Sequence[str],
    *,
    together: Together | None = None,
) -> Simulation:
    """Runs ``server`` over one virtual node a client; nodes stand in the order of ``clients``.

    Clients train one after the other, or ``together``, where the caller brings what trains them.

    A client's state comes into being with its first message, so clients that are never selected
    cost nothing. One thread computes: models and batches of clients are small, and a pool of
    threads costs them more than it gives (five times the time on a busy machine).
    """
    assume_identity(_RUN_ID)
    contexts: dict[str, Context] = {}
    rounds: Counter[str] = Counter()

    def arrive(message: Message) -> str:
        name = clients[message.metadata.dst_node_id - _FIRST_NODE_ID]
        if name not in contexts:
            contexts[name] = _context(message.metadata.dst_node_id, name)
        rounds[name] += message.metadata.message_type == MessageType.TRAIN
        return name

    def handle(message: Message) -> Message:
        name = arrive(message)
        try:
            return client(message, contexts[name])
        except Exception as error:  # as a node does: a mod that fails is a client that fails
            reason = f"client {name!r}: its app raised {type(error).__name__}: {error}"
            return Message(Error(REFUSED, reason), reply_to=message)

    def handle_cohort(messages: Sequence[Message]) -> Iterator[Message]:
        assert together is not None
        return together([arrive(message) for message in messages], messages)

    nodes = range(_FIRST_NODE_ID, _FIRST_NODE_ID + len(clients))
    grid = InProcessGrid(_RUN_ID, nodes, handle, handle_cohort if together else None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        server(grid, _context(SERVER_NODE_ID, "server"))
    finally:
        torch.set_num_threads(threads)
    return Simulation(contexts, rounds)


def _context(node_id: int, name: str) -> Context:
    return Context(
        run_id=_RUN_ID,
        node_id=node_id,
        node_config={"client": name},
        state=RecordDict(),
        run_config={},
    )
