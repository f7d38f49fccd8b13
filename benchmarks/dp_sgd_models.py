"""The models that `benchmarks.dp_sgd` trains, small enough for a device, and their examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tasks.models import cnn, logistic
from fedcore.task.definition import Task
from fedcore.task.kinds.registry import KindName

_VOCABULARY = 96
_TABLE = (125_000, 64)  # 8 million numbers


@dataclass(frozen=True)
class Setting:
    """One workload: a model and one batch of made-up examples."""

    name: str
    kind: KindName
    model: Callable[[], nn.Module]
    inputs: Tensor
    """``(B, ...)``."""
    targets: Tensor
    """``(B, ...)``."""

    @property
    def task(self) -> Task:
        """What fedcore is told of it."""

        def nothing(*_: object) -> object:
            raise AssertionError("the benchmark reads no data")

        return Task(
            name=self.name,
            kind=self.kind,
            model=self.model,
            clients=nothing,  # type: ignore[arg-type]
            client_data=nothing,  # type: ignore[arg-type]
            test_data=nothing,  # type: ignore[arg-type]
            example_input=self.inputs[0],
        )


class Window(nn.Module):
    """A GRU of 64 units over windows of 24 readings of 8 sensors, and one number from its end."""

    def __init__(self, layer: Callable[..., nn.Module] = nn.GRU) -> None:
        super().__init__()
        self.layer = layer(8, 64, batch_first=True)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``(B, 24, 8)``, gives ``(B, 1)``."""
        states, _ = self.layer(x)
        found: Tensor = self.head(states[:, -1])
        return found


class _Block(nn.Module):
    """Attention and two dense layers, each behind normalisation and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.of_all, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Takes and gives ``(B, T, width)``."""
        split = self.of_all(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        seen = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        result: Tensor = x + self.narrow(functional.gelu(self.wide(self.norm_2(x))))
        return result


class Characters(nn.Module):
    """A transformer of two blocks over 64 characters: 116,576 parameters."""

    def __init__(self, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(_Block(width, 4), _Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``(B, T)``, gives ``(B, T, characters)``."""
        places = torch.arange(x.shape[1]).expand_as(x)  # of each example: Opacus wants it so
        found: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))
        return found


class Words(nn.Module):
    """A table of 8 million numbers, the mean over an example's 32 words, and ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(*_TABLE)
        self.head = nn.Linear(_TABLE[1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``(B, 32)``, gives ``(B, 10)``."""
        found: Tensor = self.head(self.table(x).mean(dim=1))
        return found


def _mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, 200), nn.ReLU()),
        *(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)),
    )


def settings() -> dict[str, Setting]:
    """All workloads, by name."""
    rng = torch.Generator().manual_seed(0)

    def images(*shape: int) -> Tensor:
        return torch.rand(64, *shape, generator=rng)

    def whole(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=rng)

    text = whole(_VOCABULARY, 64, 65)
    found = (
        Setting("w1", "classification", cnn, images(1, 28, 28), whole(10, 64)),
        Setting("w2", "classification", logistic, images(784), whole(10, 64)),
        Setting("mlp", "classification", _mlp, images(784), whole(10, 64)),
        Setting("gru", "regression", Window, images(24, 8), images()),
        Setting(
            "characters",
            "next_token",
            Characters,
            text[:, :-1].contiguous(),
            text[:, 1:].contiguous(),
        ),
        Setting("words", "classification", Words, whole(_TABLE[0], 256, 32), whole(10, 256)),
    )
    return {one.name: one for one in found}
