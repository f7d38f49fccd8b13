"""Networks of every kind that devices train under privacy, with examples for each, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.seeds import global_streams, torch_rng
from fedcore.task.definition import Loss


class Text(nn.Module):
    """Embedded words, positions that are broadcast, attention, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.places = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h.mean(1))


class Tied(nn.Module):
    """The table of words is the head's matrix, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.mix(self.words(x))).mean(1), self.words.weight)


class Unused(nn.Module):
    """A head that this task does not ask."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        self.other = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.layer = layer
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.words(x))[0][:, -1])


class Sequences(nn.Module):
    """A recurrent layer over measurements, whose last output counts."""

    def __init__(self, layer: nn.RNNBase, size: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.layer(x)
        return self.head(torch.relu(found[:, -1, :]))


class LastState(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.layer(x)
        return self.head(state.squeeze(0))


class PerStep(nn.Module):
    """The same dense layers for each step of a sequence, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x))).mean(1))


class PerRow(nn.Module):
    """A convolution, and dense layers over the rows of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(9, 5)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(self.conv(x).mean(3))).flatten(1))


@dataclass(frozen=True)
class Network:
    """A model and what it is trained on."""

    model: Callable[[], nn.Module]
    examples: Callable[[int], tuple[Tensor, Tensor]]
    """So many inputs ``(B, ...)`` and targets ``(B, ...)``."""
    way: str
    """How its gradients are taken."""
    opacus: bool = True
    """Whether Opacus takes each example's gradient of it."""
    loss: Loss = functional.cross_entropy

    def build(self) -> nn.Module:
        with global_streams(5):
            return self.model()


def rows(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6, generator=torch_rng(0)), torch.arange(count) % 3


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 9, 8, generator=torch_rng(0)), torch.arange(count) % 3


def windows(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 5, 4, generator=torch_rng(0)), torch.arange(count) % 3


def words(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (count, 5), generator=torch_rng(0)), torch.arange(count) % 3


NETWORKS: dict[str, Network] = {
    "dense": Network(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3, bias=False)),
        *(rows, "chain"),
    ),
    "convolution": Network(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)),
        ),
        *(images, "chain"),
    ),
    "grouped convolution": Network(
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, groups=2), nn.Flatten(), nn.Linear(336, 3)),
        *(images, "vmap"),
    ),
    "group norm": Network(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 3)),
        ),
        *(images, "chain"),
    ),
    "instance norm, and a mean": Network(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Flatten()),
            *(nn.LayerNorm(336, bias=False), nn.Linear(336, 3)),
        ),
        *(images, "chain"),
        opacus=False,
    ),
    "gru over measurements": Network(
        lambda: Sequences(nn.GRU(4, 7, batch_first=True), 7),
        *(windows, "chain"),
        opacus=False,  # it does not run a GRU without a given state
    ),
    "lstm, deep": Network(
        lambda: Sequences(nn.LSTM(4, 5, num_layers=2, batch_first=True), 5),
        *(windows, "chain"),
        opacus=False,
    ),
    "gru's last state": Network(
        lambda: LastState(nn.GRU(4, 7, batch_first=True, bias=False)),
        *(windows, "chain"),
        opacus=False,
    ),
    "dense over the steps": Network(PerStep, *(windows, "chain")),
    "dense over the rows of images": Network(PerRow, *(images, "chain")),
    "attention": Network(Text, words, "vmap", opacus=False),
    "tied": Network(Tied, words, "vmap", opacus=False),
    "unused": Network(Unused, rows, "vmap", opacus=False),
    "frozen": Network(
        lambda: nn.Sequential(nn.Linear(6, 9).requires_grad_(False), nn.ReLU(), nn.Linear(9, 3)),
        *(rows, "vmap"),
    ),
    "gru": Network(
        lambda: Recurrent(nn.GRU(6, 7, batch_first=True, bidirectional=True), 14),
        *(words, "vmap"),
        opacus=False,
    ),
    "lstm": Network(
        lambda: Recurrent(nn.LSTM(6, 7, batch_first=True), 7), words, "vmap", opacus=False
    ),
    "rnn": Network(
        lambda: Recurrent(nn.RNN(6, 7, batch_first=True), 7), words, "vmap", opacus=False
    ),
    "smoothed": Network(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 3)),
        *(rows, "chain"),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
}
