"""DP-SGD in a loop over clients with Opacus: `make_private` for each, its accountant carried on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.choose import quickest
from benchmarks.peers.common import Request, Result, answer, cohorts, now_s, read_request
from benchmarks.peers.torch_data import Partition, accuracy, load, make_model
from benchmarks.workloads import Noise, Workload

History = dict[str, Any]
MODES = ("hooks", "ghost")


def main() -> None:
    """Runs the workload with the gradient mode and thread count that are quickest here."""
    warnings.simplefilter("ignore")
    request = read_request()
    partition, workload = load(request.data), request.workload
    model = make_model(workload, request.seed)
    mode, threads = fastest(model, partition, workload)
    torch.set_num_threads(threads)
    ends_s, histories = run(model, partition, request, mode)
    spent = epsilons(histories, noise_of(workload).target_delta)
    answer(
        Result(
            ends_s=ends_s,
            accuracy=accuracy(model, partition),
            epsilon=min(spent),
            epsilon_max=max(spent),
            chosen={"mode": mode, "threads": threads},
        )
    )


class Client(Dataset[tuple[Tensor, Tensor]]):
    """One client's examples, fetched a batch at a time: quicker than one by one."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Keeps the tensors."""
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """One example."""
        return self.images[row], self.labels[row]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch, as the one element of a list, which `together` takes out again."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return [(self.images[index], self.labels[index])]


def together(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `Client.__getitems__` has put together."""
    return batch[0]


def noise_of(workload: Workload) -> Noise:
    """The workload's DP-SGD."""
    assert workload.noise is not None
    return workload.noise


def run(
    model: nn.Module, partition: Partition, request: Request, mode: str
) -> tuple[list[float], list[History]]:
    """Federated averaging; leaves the last model in ``model``, and returns clients' accounts."""
    weights = list(model.parameters())
    histories: dict[int, History] = {}
    ends_s = []
    for clients in cohorts(request, partition.clients):
        start = [w.detach().clone() for w in weights]
        total = [torch.zeros_like(w) for w in start]
        examples = 0
        for client in clients:
            images, labels = partition.of(client)
            histories[client] = train(
                model, images, labels, request.workload, mode, histories.get(client)
            )
            with torch.no_grad():
                torch._foreach_add_(total, weights, alpha=len(labels))
                torch._foreach_copy_(weights, start)
            examples += len(labels)
        with torch.no_grad():
            torch._foreach_div_(total, examples)
            torch._foreach_copy_(weights, total)
        ends_s.append(now_s())
    return ends_s, list(histories.values())


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    workload: Workload,
    mode: str,
    spent: History | None,
) -> History:
    """One client's local epochs; returns its accountant's state."""
    noise = noise_of(workload)
    model.train()
    engine = PrivacyEngine(accountant="rdp")
    if spent is not None:
        engine.accountant.load_state_dict(spent)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), workload.learning_rate),
        data_loader=DataLoader(
            Client(images, labels), batch_size=workload.batch_size, collate_fn=together
        ),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=noise.noise_multiplier,
        max_grad_norm=noise.clip_norm,
        grad_sample_mode=mode,
    )
    if mode == "ghost":
        private, optimizer, criterion, loader = made
    else:
        (private, optimizer, loader), criterion = made, nn.CrossEntropyLoss()
    for _ in range(workload.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(private(inputs), targets).backward()
            optimizer.step()
    private.to_standard_module()
    return engine.accountant.state_dict()


def epsilons(histories: Sequence[History], delta: float) -> list[float]:
    """What the accounts come to; each computed once, for clients that took part equally often."""
    found = []
    for history in {repr(history["history"]): history for history in histories}.values():
        engine = PrivacyEngine(accountant="rdp")
        engine.accountant.load_state_dict(history)
        found.append(float(engine.accountant.get_epsilon(delta)))
    return found


def fastest(model: nn.Module, partition: Partition, workload: Workload) -> tuple[str, int]:
    """The gradient mode and thread count that train a few clients in the least time."""
    weights = [w.detach().clone() for w in model.parameters()]

    def attempt(option: tuple[int, str], client: int) -> None:
        threads, mode = option
        torch.set_num_threads(threads)
        train(model, *partition.of(client), workload, mode, None)

    options = list(itertools.product(range(1, torch.get_num_threads() + 1), MODES))
    threads, mode = quickest(options, attempt)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), weights)
    return mode, threads


if __name__ == "__main__":
    main()
