"""No framework: one process trains one client after the other in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from benchmarks.peers.choose import quickest
from benchmarks.peers.common import Request, Result, answer, cohorts, now_s, read_request
from benchmarks.peers.torch_data import Partition, accuracy, load, make_model
from benchmarks.workloads import Workload


def main() -> None:
    """Runs the workload with the thread count and memory format that are quickest here."""
    request = read_request()
    partition, workload = load(request.data), request.workload
    model = make_model(workload, request.seed)
    threads, layout = fastest(model, partition, request)
    torch.set_num_threads(threads)
    model.to(memory_format=layout)
    ends_s = run(model, partition, request)
    answer(
        Result(
            ends_s=ends_s,
            accuracy=accuracy(model, partition),
            chosen={"threads": threads, "memory_format": str(layout)},
        )
    )


def run(model: nn.Module, partition: Partition, request: Request) -> list[float]:
    """Federated averaging; leaves the last model in ``model``."""
    weights = list(model.parameters())
    ends_s = []
    for clients in cohorts(request, partition.clients):
        start = [w.detach().clone() for w in weights]
        total = [torch.zeros_like(w) for w in start]
        examples = 0
        for client in clients:
            images, labels = partition.of(client)
            train(model, images, labels, request.workload)
            with torch.no_grad():
                torch._foreach_add_(total, weights, alpha=len(labels))
                torch._foreach_copy_(weights, start)
            examples += len(labels)
        with torch.no_grad():
            torch._foreach_div_(total, examples)
            torch._foreach_copy_(weights, total)
        ends_s.append(now_s())
    return ends_s


def train(model: nn.Module, images: Tensor, labels: Tensor, workload: Workload) -> None:
    """One client's local epochs."""
    optimizer = torch.optim.SGD(model.parameters(), workload.learning_rate)
    for _ in range(workload.epochs):
        for rows in torch.randperm(len(labels)).split(workload.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


def fastest(
    model: nn.Module, partition: Partition, request: Request
) -> tuple[int, torch.memory_format]:
    """The thread count and memory format that train a few clients in the least time."""
    weights = [w.detach().clone() for w in model.parameters()]
    layouts = [torch.contiguous_format]
    if partition.images.dim() == 4 and not request.stock:
        layouts.append(torch.channels_last)

    def attempt(option: tuple[int, torch.memory_format], client: int) -> None:
        threads, layout = option
        torch.set_num_threads(threads)
        model.to(memory_format=layout)
        train(model, *partition.of(client), request.workload)

    options = list(itertools.product(range(1, torch.get_num_threads() + 1), layouts))
    chosen = quickest(options, attempt)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), weights)
    return chosen


if __name__ == "__main__":
    main()
