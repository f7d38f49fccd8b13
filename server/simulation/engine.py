"""Runs any pair of Flower apps in this process, one virtual client after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Context, Error, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import SERVER_NODE_ID, assume_identity
from fedcore.updates.messages import REFUSED
from server.simulation.virtual.nodes import FIRST_NODE_ID, RUN_ID, context_of, one_thread


@dataclass(frozen=True)
class SimulatedClients:
    """State of the virtual clients after a run, by name."""

    contexts: Mapping[str, Context]
    rounds: Mapping[str, int]
    """How often each client was asked to train."""


def simulate(server: ServerApp, client: ClientApp, clients: Sequence[str]) -> SimulatedClients:
    """Runs ``server`` with one virtual node per client; nodes are in the order of ``clients``.

    A client's state is created with its first message, so clients that are never selected cost
    nothing. For fedcore's own apps, `server.simulation.federate` is a faster equivalent.
    """
    assume_identity(RUN_ID)
    contexts: dict[str, Context] = {}
    rounds: Counter[str] = Counter()

    def handle(message: Message) -> Message:
        node = message.metadata.dst_node_id
        name = clients[node - FIRST_NODE_ID]
        if name not in contexts:
            contexts[name] = context_of(node, name)
        rounds[name] += message.metadata.message_type == MessageType.TRAIN
        try:
            return client(message, contexts[name])
        except Exception as error:  # like a Flower node: an error in a mod is the client's failure
            reason = f"client {name!r}: its app raised {type(error).__name__}: {error}"
            return Message(Error(REFUSED, reason), reply_to=message)

    nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + len(clients))
    with one_thread():
        server(InProcessGrid(RUN_ID, nodes, handle), context_of(SERVER_NODE_ID, "server"))
    return SimulatedClients(contexts, rounds)
