"""The deployment benchmark's task in Flower's own terms: both sides of one app."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

SMALL_PARAMETERS = 32 * 64 + 64 + 64 * 46 + 46


class Net(nn.Module):
    """Two layers, and as many further weights as make up the number that is asked for."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 46))
        pad = parameters - SMALL_PARAMETERS
        self.pad = nn.Parameter(torch.randn(pad)) if pad else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.net(x)


class Timed(FedAvg):
    """FedAvg that notes when each round begins and ends."""

    out: Path
    last = "train"
    updates = 0

    def note(self, event: str, number: int) -> None:
        """Appends a line."""
        line = {"event": event, "round": number, "at_s": time.monotonic(), "updates": self.updates}
        with self.out.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
        """Flower's own, timed."""
        self.note("began", server_round)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        """Flower's own, timed."""
        replies = list(replies)
        self.updates = sum(not reply.has_error() for reply in replies)
        found = super().aggregate_train(server_round, replies)
        if self.last == "train":
            self.note("ended", server_round)
        return found

    def aggregate_evaluate(self, server_round, replies):  # type: ignore[no-untyped-def]
        """Flower's own, timed."""
        found = super().aggregate_evaluate(server_round, replies)
        if self.last == "evaluate":
            self.note("ended", server_round)
        return found


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """As many rounds as the configuration says, over all nodes."""
    config = context.run_config
    nodes, evaluate = int(config["nodes"]), bool(config["evaluate"])
    strategy = Timed(
        fraction_evaluate=1.0 if evaluate else 0.0,
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes if evaluate else 0,
        min_available_nodes=nodes,
    )
    strategy.out, strategy.last = Path(str(config["out"])), "evaluate" if evaluate else "train"
    strategy.note("loaded", 0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net(int(config["parameters"])).state_dict()),
        num_rounds=int(config["rounds"]),
    )
    strategy.note("over", 0)


client = ClientApp()


def _of(message: Message, context: Context) -> tuple[Net, torch.Tensor, torch.Tensor]:
    model = Net(int(context.run_config["parameters"]))
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    rng = torch.Generator().manual_seed(context.node_id % 2**31)
    return model, torch.randn(100, 32, generator=rng), torch.randint(46, (100,), generator=rng)


@client.train()
def train(message: Message, context: Context) -> Message:
    """One epoch of SGD in batches of 20."""
    model, inputs, targets = _of(message, context)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.randperm(len(inputs)).split(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(inputs)})
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss on the same data."""
    model, inputs, targets = _of(message, context)
    with torch.inference_mode():
        loss = float(nn.functional.cross_entropy(model(inputs), targets))
    metrics = MetricRecord({"num-examples": len(inputs), "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
