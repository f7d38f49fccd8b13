"""Results of the federated model by client, which only a simulation can compute."""

from __future__ import annotations

import copy
from functools import partial

from fedcore.config.run import RunConfig
from fedcore.errors import InsufficientMemory
from fedcore.privacy.ledger import Ledger
from fedcore.task.definition import Examples, Folder, Task, size_of
from fedcore.task.model import FullModel
from fedcore.training.evaluate import evaluate
from fedcore.training.examples import task_examples
from fedcore.updates.local import load_local
from server.records import ClientRecord
from server.simulation.virtual.state import SimulationState

MAX_CLIENTS = 1000
"""Maximum number of clients evaluated; reading all clients' data again could take as long as the
run."""


def client_records(
    run: RunConfig,
    task: Task,
    model: FullModel,
    state: SimulationState,
    data: Folder,
) -> tuple[ClientRecord, ...]:
    """Returns a record per client that took part, for the first `MAX_CLIENTS` by name.

    Each is measured with the layers that it keeps to itself. Leaves out clients whose data cannot
    be read or evaluated.
    """
    records = []
    for name in sorted(state.rounds)[:MAX_CLIENTS]:
        judged = _judged(task, own_model(model, state, name), name, data)
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


def own_model(model: FullModel, state: SimulationState, name: str) -> FullModel:
    """Returns the federated model with the local layers of the client ``name``.

    The model itself where the client has none; else a copy.
    """
    layers = state.locals.get(name)
    if not layers:
        return model
    own = copy.deepcopy(model)
    load_local(layers, own.model)
    return own


def _judged(task: Task, model: FullModel, name: str, data: Folder) -> tuple[Examples, float] | None:
    """Returns a client's examples and the model's metric on them.

    None where they cannot be read or evaluated; such a client has also failed in the rounds. The
    metric is NaN where it is undefined on them.
    """
    try:
        what = f"data of client {name!r}"
        load = partial(task.client_data, name, data)
        examples = task_examples(task, load, what=what, folder=data)
        return examples, evaluate(model, examples, [task.primary])[task.primary.name]
    except InsufficientMemory:
        raise
    except (Exception, SystemExit):  # the task's code may raise anything
        return None
