"""Small models of the zoo: one of each sort that people bring."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

FEATURES, CLASSES, STEPS, TOKENS, WIDTH = 6, 3, 5, 11, 8
Build = Callable[[], nn.Module]


def linear(outs: int = CLASSES) -> nn.Module:
    return nn.Linear(FEATURES, outs)


def mlp(outs: int = CLASSES) -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, outs)
    )


def normed_mlp(**options: float | bool | None) -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH),
        nn.BatchNorm1d(WIDTH, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )


def cnn(norm: Callable[[int], nn.Module], outs: int = CLASSES) -> nn.Module:
    """For images ``(1, 8, 8)``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, outs)),
    )


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def conv1d(outs: int) -> nn.Module:
    """For signals ``(1, 32)``."""
    return nn.Sequential(
        *(nn.Conv1d(1, 4, 5, padding=2), nn.ReLU(), nn.AvgPool1d(8)),
        *(nn.Flatten(), nn.Linear(16, outs)),
    )


def pixels(classes: int = CLASSES) -> nn.Module:
    """A class for each pixel of images ``(1, 8, 8)``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, classes, 1)),
    )


class Recurrent(nn.Module):
    """A recurrent layer over windows ``(T, F)``, and a head for its last or for all steps."""

    def __init__(self, layer: type[nn.GRU | nn.LSTM], *, every: bool = False, both: bool = False):
        super().__init__()
        self.layer = layer(FEATURES, WIDTH, batch_first=True, bidirectional=both)
        self.head = nn.Linear(WIDTH * (1 + both), CLASSES)
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)[0]
        return self.head(found if self.every else found[:, -1])  # type: ignore[no-any-return]


class ClassToken(nn.Module):
    """A transformer over windows ``(T, F)`` that reads the answer from a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, STEPS + 1, WIDTH) * 0.1)
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        found = self.block(torch.cat([token, self.embed(x)], dim=1) + self.places)
        return self.head(found[:, 0])  # type: ignore[no-any-return]


class Language(nn.Module):
    """A causal transformer over tokens ``(T,)``; the head may share the embedding's weights."""

    def __init__(self, tokens: int = TOKENS, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.head = nn.Linear(WIDTH, tokens, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        hidden = torch.full((STEPS, STEPS), float("-inf")).triu(1)
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x), src_mask=self.hidden))  # type: ignore[no-any-return]


class Bag(nn.Module):
    """Mean of embeddings of tokens ``(T,)``."""

    def __init__(self, tokens: int = TOKENS) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(dim=1))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """A first layer that is frozen, and one that nothing reads."""

    def __init__(self, *, frozen: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH).requires_grad_(not frozen)
        if unused:
            self.spare = nn.Linear(FEATURES, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Counting(nn.Module):
    """Counts its training steps in an integer buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.layer(x)  # type: ignore[no-any-return]


class Constants(nn.Module):
    """Holds integers and booleans that training does not change."""

    order: Tensor
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("order", torch.arange(FEATURES).flip(0))
        self.register_buffer("kept", torch.arange(FEATURES) > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, self.order] * self.kept)  # type: ignore[no-any-return]


class Two(nn.Module):
    """Answers with a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layer(x)
        return found, found


class Branching(nn.Module):
    """Decides by a value what to compute, which no export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(-x if float(x.sum()) > 0 else x)  # type: ignore[no-any-return]


class OverBatch(nn.Module):
    """Subtracts the mean of the batch: an answer depends on what else is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(dim=0))  # type: ignore[no-any-return]


class Log1p(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x)


class Scaled(nn.Module):
    """Bytes or booleans to floats."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


class Filled(nn.Module):
    """Zero for what is missing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(x)


class Spectrum(nn.Module):
    """Magnitudes of a short-time Fourier transform of signals ``(32,)``, ``(9 * 5,)``."""

    def forward(self, x: Tensor) -> Tensor:
        window = torch.hann_window(16, device=x.device)
        found = torch.stft(x, 16, hop_length=8, window=window, return_complex=True)
        return found.abs().flatten(1)
