"""The ClientApp of the Flower peer, a module of its own so that Ray's actors import it once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from benchmarks.peers.bare import train
from benchmarks.peers.torch_data import load, make_model
from benchmarks.workloads import Workload, read_workload

app = ClientApp()


@cache
def resident(name: str) -> tuple[Workload, nn.Module]:
    """The model stays in the actor from one message to the next, as the data does."""
    workload, model = fresh(name)
    return workload, model.to(memory_format=torch.channels_last)


def fresh(name: str) -> tuple[Workload, nn.Module]:
    """A model for one message, in the usual memory format."""
    torch.set_num_threads(1)  # the actor has one CPU
    workload = read_workload(name)
    return workload, make_model(workload, seed=0)


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """Trains one client and answers with its weights and its number of examples."""
    config = message.content.config_records["config"]
    find, read = (fresh, load.__wrapped__) if config["stock"] else (resident, load)
    workload, model = find(str(config["workload"]))
    partition = read(Path(str(config["data"])))
    images, labels = partition.of(int(context.node_config["partition-id"]))
    arrays = message.content.array_records["arrays"]
    model.load_state_dict(arrays.to_torch_state_dict())
    train(model, images, labels, workload)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(labels)}),
        }
    )
    return Message(content, reply_to=message)
