"""Runs a ServerApp and a ClientApp in this process, one virtual client after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import SERVER_NODE_ID, assume_identity

_RUN_ID = 1
_FIRST_NODE_ID = SERVER_NODE_ID + 1


@dataclass(frozen=True)
class Simulation:
    """What is left of the virtual clients: each one's own state, by its name."""

    contexts: Mapping[str, Context]
    rounds: Mapping[str, int]
    """How often each client was asked to train."""


def simulate(server: ServerApp, client: ClientApp, clients: Sequence[str]) -> Simulation:
    """Runs ``server`` over one virtual node a client; nodes stand in the order of ``clients``.

    A client's state comes into being with its first message, so clients that are never selected
    cost nothing.
    """
    assume_identity(_RUN_ID)
    contexts: dict[str, Context] = {}
    rounds: Counter[str] = Counter()

    def handle(message: Message) -> Message:
        name = clients[message.metadata.dst_node_id - _FIRST_NODE_ID]
        if name not in contexts:
            contexts[name] = _context(message.metadata.dst_node_id, name)
        rounds[name] += message.metadata.message_type == MessageType.TRAIN
        return client(message, contexts[name])

    nodes = range(_FIRST_NODE_ID, _FIRST_NODE_ID + len(clients))
    server(InProcessGrid(_RUN_ID, nodes, handle), _context(SERVER_NODE_ID, "server"))
    return Simulation(contexts, rounds)


def _context(node_id: int, name: str) -> Context:
    return Context(
        run_id=_RUN_ID,
        node_id=node_id,
        node_config={"client": name},
        state=RecordDict(),
        run_config={},
    )
