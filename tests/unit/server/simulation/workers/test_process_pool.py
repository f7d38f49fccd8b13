"""Processes that share nothing with this one do the same work."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path

import pytest
from flwr.app import MessageType, RecordDict

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.flower.identity import assume_identity
from fedcore.task.definition import load_task
from fedcore.task.model import build_model
from fedcore.updates.messages import ARRAYS, CONFIG, instruction_config, weights_record
from fedcore.updates.pack import layout_of, pack
from server.simulation.federate import worker_elsewhere
from server.simulation.virtual.nodes import RUN_ID
from server.simulation.workers.executor import LocalExecutor
from server.simulation.workers.messages import ClientRef, RoundTask
from server.simulation.workers.process_pool import ProcessPool

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

def data(name, folder):
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(int(name)))
    return TensorDataset(inputs, inputs.argmax(1))

task = Task(
    name="tiny", kind="classification", model=lambda: nn.Linear(4, 4),
    clients=lambda folder: [str(n) for n in range(8)], client_data=data,
    test_data=lambda folder: data("0", folder), example_input=torch.zeros(4),
)
"""


@pytest.mark.slow
def test_processes_that_are_started_afresh_give_the_bits_of_this_one(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(TASK)
    run = RunConfig(name="tiny", task=str(path))
    model = build_model(load_task(path), run)
    config = instruction_config(layout_of(model.model), b"")
    config["server-round"] = 1
    content = RecordDict({ARRAYS: weights_record(pack(model.model)), CONFIG: config})
    order = RoundTask(MessageType.TRAIN, content, fold=True)
    asked = [ClientRef(node, str(node), None) for node in range(8)]
    make = partial(worker_elsewhere, path, run, OPEN_POLICY, None)
    assume_identity(RUN_ID)
    here, total = LocalExecutor(make()).run_task(order, asked)
    pool = ProcessPool(make, 2, gpus=1)
    try:
        there, other = pool.run_task(order, asked)
    finally:
        pool.close()
    assert there == here
    assert len(there) == total.count == 8
    assert other.mean().tobytes() == total.mean().tobytes()
    assert multiprocessing.active_children() == []
