"""What processes of one training exchange besides gradients: losses, CPU time, requests to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

_EXCHANGE_S = 0.5
MOST_STEPS = 50
"""Most steps between two exchanges."""


@dataclass(frozen=True)
class Group:
    """A process among those that train together."""

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None
    """Group of all processes for tensors on the CPU; None for the default one."""
    together: bool = False
    """Whether every process computes each batch as a whole, with its part of the model."""

    @property
    def shares(self) -> int:
        """Number of shares that a batch is divided into."""
        return 1 if self.together else self.world

    @property
    def share(self) -> int:
        """Number of this process's share."""
        return 0 if self.together else self.rank

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum over processes of a tensor on the CPU."""
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def least(self, value: int) -> int:
        """Returns the smallest of the numbers that processes give."""
        found = torch.tensor([value], dtype=torch.int64)
        if self.world > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self.control)
        return int(found)

    def agreed(self, value: int) -> int:
        """Returns the number that the first process gives."""
        sent = torch.tensor([value], dtype=torch.int64)
        if self.world > 1:
            dist.broadcast(sent, src=0, group=self.control)
        return int(sent)


ALONE = Group()


def make_group(device: torch.device) -> Group:
    """Returns the group of this process; the default process group must be initialised.

    To be called once, by every process: on GPUs each call makes a process group more.
    """
    control = dist.new_group(backend="gloo") if device.type == "cuda" else None
    return Group(dist.get_rank(), dist.get_world_size(), control)


@dataclass(frozen=True)
class Exchanged:
    """What all processes know after an exchange, equal in each of them."""

    first_step: int
    """The first of the steps that the losses belong to."""
    losses: tuple[float, ...]
    """Mean loss of each step over the examples of all processes."""
    examples: int
    """Examples of these steps, over all processes."""
    seconds: float
    """Time of these steps, the mean over processes."""
    busy_s: tuple[float, ...]
    """CPU time of each process in these steps."""
    memory_bytes: tuple[int, ...]
    """Memory of each process, see `fedcore.training.memory.used_bytes`; 0 where it is not known."""
    learning_rate: float
    """That of the last of these steps."""
    stop: bool
    """Whether any process was asked to stop."""

    @property
    def finite(self) -> bool:
        """Whether every loss is finite."""
        return all(map(math.isfinite, self.losses))


@dataclass
class StepLog:
    """Collects losses of steps, and shares them with the other processes every half second.

    How often depends on the time that steps take; all processes take the same decision, since they
    take it on shared figures.
    """

    group: Group
    asked: Callable[[], bool]
    """Whether this process was asked to stop."""
    used_bytes: Callable[[], int | None]
    """Returns the memory of this process."""
    _sums: list[Tensor] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)
    _every: int = 1
    _began_s: float = field(default_factory=time.monotonic)
    _busy_from_s: float = field(default_factory=time.process_time)

    def add(self, loss_sum: Tensor, count: int) -> bool:
        """Adds a step's sum of losses; returns whether an exchange is due."""
        self._sums.append(loss_sum)
        self._counts.append(count)
        return self.due

    @property
    def due(self) -> bool:
        """Whether an exchange is due."""
        return len(self._sums) >= self._every

    def exchange(self, step: int, rate: float) -> Exchanged | None:
        """Shares what was added since the last exchange; None if that is nothing.

        Args:
            step: Number of steps taken so far.
            rate: The learning rate of the last one.
        """
        number, world = len(self._sums), self.group.world
        if not number:
            return None
        sums = torch.stack(self._sums).to("cpu", torch.float64)  # waits for the device
        now_s, busy_s = time.monotonic(), time.process_time()
        values = torch.zeros(2 * (number + world) + 2, dtype=torch.float64)
        values[:number], values[number : 2 * number] = sums, torch.tensor(self._counts)
        of_rank = values[2 * number : -2].view(2, world)[:, self.group.rank]
        of_rank[0], of_rank[1] = busy_s - self._busy_from_s, self.used_bytes() or 0
        values[-2], values[-1] = now_s - self._began_s, float(self.asked())
        totals = self.group.total(values)
        seconds = totals[-2].item() / world
        self._every = max(1, min(MOST_STEPS, round(_EXCHANGE_S * number / max(seconds, 1e-6))))
        self.forget()
        busy, memory = totals[2 * number : -2].view(2, world)
        return Exchanged(
            first_step=step - number,
            losses=tuple((totals[:number] / totals[number : 2 * number]).tolist()),
            examples=int(totals[number : 2 * number].sum()) * self.group.shares // world,
            seconds=seconds,
            busy_s=tuple(busy.tolist()),
            memory_bytes=tuple(map(int, memory.tolist())),
            learning_rate=rate,
            stop=bool(totals[-1]),
        )

    def forget(self) -> None:
        """Drops what was added since the last exchange."""
        self._sums, self._counts = [], []
        self._began_s, self._busy_from_s = time.monotonic(), time.process_time()
