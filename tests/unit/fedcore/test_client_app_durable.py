"""Real data are not trained on with privacy where nothing is kept of what it cost."""

from __future__ import annotations

import pytest
import torch
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.client_app import DurableLedger, client_app
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import Privacy, RunConfig
from fedcore.errors import PrivacyError
from fedcore.privacy.ledger import OtherRuns
from fedcore.seeds import Randomness, Simulated, SystemEntropy
from fedcore.task.definition import Task

DATA = TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Linear(2, 2),
    clients=lambda folder: ["anna"],
    client_data=lambda client, folder: DATA,
    test_data=lambda folder: DATA,
    example_input=torch.zeros(2),
)


def app(
    randomness: Randomness, *, private: bool, durable: DurableLedger | None = None
) -> ClientApp:
    privacy = Privacy(unit="example" if private else "none")
    run = RunConfig(name="x", task="t.py", privacy=privacy)
    return client_app(TASK, run, owner=OPEN_POLICY, randomness=randomness, durable=durable)


def test_a_node_that_forgets_its_ledger_with_its_process_is_refused() -> None:
    """As under a SuperNode of Flower's, which keeps a node's state in memory."""
    with pytest.raises(PrivacyError, match=r"a ledger that outlives this process.*client start"):
        app(SystemEntropy(), private=True)


def test_a_ledger_on_disk_a_simulation_and_a_run_without_privacy_are_let_through() -> None:
    assert app(SystemEntropy(), private=True, durable=DurableLedger(OtherRuns(), lambda: None))
    assert app(Simulated(1), private=True)
    assert app(SystemEntropy(), private=False)
