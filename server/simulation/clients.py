"""How the federated model does on each client: known only because the clients are simulated."""

from __future__ import annotations

from fedcore.config import RunConfig
from fedcore.errors import DataError
from fedcore.model import FullModel
from fedcore.privacy.ledger import Ledger
from fedcore.task import Folder, Task, read_examples, size_of
from fedcore.training.evaluate import evaluate
from server.records import ClientRecord
from server.simulation.state import State

MOST = 1000
"""Clients that are looked at; reading every one's data again would rival the run itself."""


def client_records(
    run: RunConfig,
    task: Task,
    model: FullModel,
    state: State,
    data: Folder,
) -> tuple[ClientRecord, ...]:
    """A record of each client that took part (the first `MOST`), in the order of their names."""
    records = []
    for name in sorted(state.rounds)[:MOST]:
        try:
            examples = read_examples(
                lambda name=name: task.client_data(name, data),  # type: ignore[misc]
                what=f"data of client {name!r}",
            )
        except DataError:
            continue  # it took no part, and the rounds said why
        ledger = state.ledgers.get(name, Ledger())
        records.append(
            ClientRecord(
                client=name,
                examples=size_of(examples),
                metric=evaluate(model, examples, [task.primary])[task.primary.name],
                epsilon=ledger.epsilon(run.privacy) if run.private else None,
                rounds=state.rounds[name],
            )
        )
    return tuple(records)
