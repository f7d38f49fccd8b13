"""Flower with its Ray backend: one CPU a client, data and model resident in the actors.

With ``--stock`` neither is, and models lie in the usual memory format, as in Flower's own examples.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers.common import Request, Result, answer, now_s, read_request
from benchmarks.peers.flower_client import app as client_app
from benchmarks.peers.torch_data import accuracy, load, make_model


class Timed(FedAvg):
    """FedAvg that notes when each round ends, and what its replies weigh."""

    def __init__(self, cohort: int, clients: int) -> None:
        """Every round trains ``cohort`` of ``clients``; nothing is evaluated meanwhile."""
        super().__init__(
            fraction_train=cohort / clients,
            fraction_evaluate=0.0,
            min_train_nodes=cohort,
            min_available_nodes=clients,
        )
        self.ends_s: list[float] = []
        self.bytes_up = 0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):  # type: ignore[no-untyped-def]
        """Flower's own aggregation, timed."""
        kept = list(replies)
        failed = [reply.error for reply in kept if reply.has_error()]
        if failed:
            raise RuntimeError(f"round {server_round}: {len(failed)} clients failed: {failed[0]}")
        self.bytes_up = sum(
            record.count_bytes()
            for reply in kept
            for record in reply.content.array_records.values()
        )
        aggregated = super().aggregate_train(server_round, kept)
        self.ends_s.append(now_s())
        return aggregated


def main() -> None:
    """Runs the workload in Flower's simulation engine."""
    request = read_request()
    random.seed(request.seed)  # Flower samples clients from it
    results: list[Result] = []
    clients = load(request.data).clients

    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        results.append(run(grid, request, clients))

    run_simulation(
        server_app=server,
        client_app=client_app,
        num_supernodes=clients,
        backend_name="ray",
        backend_config={
            "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    answer(results[0])


def run(grid: Grid, request: Request, clients: int) -> Result:
    """All rounds, and the accuracy of the last model."""
    workload = request.workload
    model = make_model(workload, request.seed)
    strategy = Timed(workload.cohort, clients)
    finished = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=request.rounds,
        train_config=ConfigRecord(
            {"workload": workload.name, "data": str(request.data), "stock": request.stock}
        ),
    )
    model.load_state_dict(finished.arrays.to_torch_state_dict())
    torch.set_num_threads(1)
    return Result(
        ends_s=strategy.ends_s,
        accuracy=accuracy(model, load(request.data)),
        bytes_per_round=2 * strategy.bytes_up,  # the same weights go down and come up
    )


if __name__ == "__main__":
    main()
