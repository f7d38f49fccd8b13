"""Data sets with rows that nobody planned for, each with one of them and without it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from fedcore.errors import FedcoreError

COUNT, WIDTH, CLASSES = 4, 5, 3
SECRET = "patient 4711"


def _raises(error: BaseException) -> Callable[[], Any]:
    def read() -> Any:
        raise error

    return read


def _input(dice: random.Random) -> torch.Tensor:
    return torch.tensor([dice.gauss(0, 1) for _ in range(WIDTH)])


def _plain(dice: random.Random) -> Callable[[], Any]:
    row = _input(dice), torch.tensor(dice.randrange(CLASSES))
    return lambda: row


def _values(dice: random.Random) -> Callable[[], Any]:
    """An input of the right form, with values nobody planned for."""
    worst = dice.choice([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, 1e-40, 0.0])
    inputs = torch.full((WIDTH,), worst) if dice.random() < 0.5 else _input(dice)
    inputs[dice.randrange(WIDTH)] = worst
    label = dice.choice([0, 1, 2, 0, 1, 2, 3, -1, -100, 2**62, -(2**63)])
    return lambda: (inputs, torch.tensor(label))


def _odd(dice: random.Random) -> Callable[[], Any]:
    """No pair of tensors of the right form."""
    x, y = _input(dice), torch.tensor(dice.randrange(CLASSES))
    row = dice.choice(
        [
            *(
                (SECRET, y),
                (x, SECRET),
                (x,),
                (x, y, y),
                (x, None),
                None,
                SECRET,
                {},
                {"x": x, "y": y},
            ),
            *((x[:-1], y), (x.unsqueeze(0), y), (torch.zeros(0), y), (x, y.repeat(2)), (x[0], y)),
            *(
                (torch.zeros(50_000), y),
                (x.double(), y),
                (x.half(), y),
                (x.long(), y),
                (x, y.int()),
            ),
            *((x > 0, y), (x.to(torch.complex64), y), (x, y.float()), (x, y.double() / 0)),
            *((x.to_sparse(), y), (x.to("meta"), y), (x, y.to("meta")), (x.requires_grad_(), y)),
            *((x.detach().numpy(), np.int64(1)), ([float(v) for v in x], 1), (1.0, 1), (x, 1.5)),
            (torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.quint8), y),
            (torch.nested.nested_tensor([x.detach(), x.detach()[:2]]), y),
        ]
    )
    return lambda: row


def _failing(dice: random.Random) -> Callable[[], Any]:
    kind = dice.choice([ValueError, MemoryError, SystemExit, RecursionError, OSError, RuntimeError])
    said = dice.choice([SECRET, f"DefaultCPUAllocator: can't allocate memory of {SECRET}"])
    if dice.random() < 0.3:
        return _raises(_refusal(dice))
    return _raises(kind(said))


def _refusal(dice: random.Random) -> FedcoreError:
    return dice.choice(FedcoreError.__subclasses__())(SECRET)


UNREADABLE = _raises(ValueError(SECRET))


class Rows(Dataset[Any]):
    def __init__(self, rows: list[Callable[[], Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]()


def data_sets(dice: random.Random) -> tuple[Any, Any]:
    """A data set, and the same one without an example; only their number is public."""
    place = dice.randrange(COUNT)
    if dice.random() < 0.25:
        rows = [dice.choice([_plain, _values])(dice)() for _ in range(COUNT)]
        inputs, targets = (torch.stack(part) for part in zip(*rows, strict=True))
        without = inputs.clone()
        without[place] = float("nan")
        return TensorDataset(inputs, targets), TensorDataset(without, targets)
    lazy = [dice.choice([_plain, _plain, _values, _odd, _failing])(dice) for _ in range(COUNT)]
    lazy[place] = dice.choice([_plain, _values, _values, _odd, _odd, _failing])(dice)
    missing = list(lazy)
    missing[place] = UNREADABLE
    if dice.random() < 0.2:
        order = dice.sample(range(COUNT), COUNT)
        return Subset(Rows(lazy), order), Subset(Rows(missing), order)
    return Rows(lazy), Rows(missing)
