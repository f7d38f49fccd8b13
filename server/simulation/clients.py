"""How the federated model does on each client: known only because the clients are simulated."""

from __future__ import annotations

from fedcore.config.run import RunConfig
from fedcore.errors import InsufficientMemory
from fedcore.privacy.ledger import Ledger
from fedcore.task.definition import Examples, Folder, Task, read_examples, size_of
from fedcore.task.model import FullModel
from fedcore.training.evaluate import evaluate
from server.records import ClientRecord
from server.simulation.virtual.state import SimulationState

MOST = 1000
"""Clients that are looked at; reading every one's data again would rival the run itself."""


def client_records(
    run: RunConfig,
    task: Task,
    model: FullModel,
    state: SimulationState,
    data: Folder,
) -> tuple[ClientRecord, ...]:
    """A record of each client that took part (the first `MOST`), in the order of their names."""
    records = []
    for name in sorted(state.rounds)[:MOST]:
        judged = _judged(task, model, name, data)
        if judged is None:
            continue
        examples, metric = judged
        ledger = state.ledgers.get(name, Ledger())
        records.append(
            ClientRecord(
                client=name,
                examples=size_of(examples),
                metric=metric,
                epsilon=ledger.epsilon(run.privacy) if run.private else None,
                rounds=state.rounds[name],
            )
        )
    return tuple(records)


def _judged(task: Task, model: FullModel, name: str, data: Folder) -> tuple[Examples, float] | None:
    """A client's examples and the model's metric on them; None where they are of no use to it.

    It took no part then, and the rounds said why.
    """
    try:
        examples = read_examples(
            lambda: task.client_data(name, data), what=f"data of client {name!r}"
        )
        return examples, evaluate(model, examples, [task.primary])[task.primary.name]
    except InsufficientMemory:
        raise
    except (Exception, SystemExit):  # whatever the task's code raises on them
        return None
