"""Losses and preprocessing of the zoo, and what carries something from example to example."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.property.zoo_models import CLASSES, STEPS, WIDTH

# What couples examples, or carries something from one to the next.


class Counting(nn.Module):
    """Counts what it sees in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.head(x)  # type: ignore[no-any-return]


class Remembering(nn.Module):
    """Keeps a running mean in a plain attribute, while it trains alone."""

    def __init__(self, *, rarely: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.mean = torch.zeros(WIDTH)
        self.rarely = rarely

    def forward(self, x: Tensor) -> Tensor:
        if self.training and (not self.rarely or float(x.detach().abs().max()) > 40):
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.head(x - self.mean)  # type: ignore[no-any-return]


def remembering_dropout() -> nn.Module:
    """What dropout draws hides the coupling from a comparison of outputs."""
    return nn.Sequential(nn.Dropout(0.5), Remembering())


class RareBuffer(nn.Module):
    """Moves a buffer for unusual values alone."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("shift", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 40:
            self.shift += x.detach()[0]
        return self.head(x - self.shift)  # type: ignore[no-any-return]


class Listing(nn.Module):
    """Keeps what it saw in a list, and compares with it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.detach().clone())
            return self.head(x - self.seen[0].mean(0))  # type: ignore[no-any-return]
        return self.head(x)  # type: ignore[no-any-return]


class RunningScale(nn.Module):
    """A preprocessing that scales by the largest value it has seen."""

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.largest.copy_(torch.maximum(self.largest, x.abs().max()))
        return x / self.largest


class CoupledWhileTraining(nn.Module):
    """Subtracts the batch's mean in training, none in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x - x.mean(0) if self.training else x)  # type: ignore[no-any-return]


class CoupledForSome(nn.Module):
    """Subtracts the batch's mean where some value is unusual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        unusual = float(x.detach().abs().max()) > 40
        x = self.first(x)
        return self.second(x - x.mean(0) if unusual else x)  # type: ignore[no-any-return]


# Preprocessing.


class ByBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0) + 1e-5)


class ByExample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(torch.fft.rfft(x, dim=-1).abs()).flatten(1)


class ShortTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        window = torch.hann_window(8)
        found = torch.stft(x.mean(1), 8, 4, window=window, return_complex=True)
        return found.abs().flatten(1)


# Losses.

WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])


def weighted_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    each = functional.cross_entropy(outputs, targets, reduction="none")
    return (WEIGHTS[targets] * each).mean()


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.transpose(1, 2), targets)


def masked_by_batch(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=0)


def masked_by_length(outputs: Tensor, targets: Tensor) -> Tensor:
    each = functional.cross_entropy(
        outputs.transpose(1, 2), targets, ignore_index=0, reduction="none"
    )
    return each.sum(1).div(STEPS).mean()


def root_of_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets).sqrt()


def sum_by_batch_size(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum") / 32


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    alike = functional.normalize(outputs, dim=-1) @ functional.normalize(targets, dim=-1).T
    return functional.cross_entropy(alike, torch.arange(len(alike)))


def ranking(outputs: Tensor, targets: Tensor) -> Tensor:
    gaps = outputs.squeeze(-1).unsqueeze(0) - outputs.squeeze(-1).unsqueeze(1)
    order = torch.sign(targets.squeeze(-1).unsqueeze(0) - targets.squeeze(-1).unsqueeze(1))
    return functional.softplus(-order * gaps).mean()


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    each = functional.cross_entropy(outputs, targets, reduction="none")
    return ((1 - torch.exp(-each)).square() * each).mean()


def focal_by_batch(outputs: Tensor, targets: Tensor) -> Tensor:
    each = functional.cross_entropy(outputs, targets, reduction="none")
    weights = (1 - torch.exp(-each)).square()
    return (weights * each).sum() / weights.sum()


def log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.nll_loss(torch.log_softmax(outputs, dim=-1), targets)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


class ClassCounts:
    """A loss that weighs classes by how often it has seen them."""

    def __init__(self) -> None:
        self.counts = torch.ones(CLASSES)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        counts = torch.bincount(targets, minlength=CLASSES)
        self.counts = self.counts + counts
        weights = 1 / self.counts
        each = functional.cross_entropy(outputs, targets, reduction="none")
        return (weights[targets] * each).mean()
