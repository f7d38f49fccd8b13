"""Models and losses for the sensitivity probe: sound ones, and ones that couple examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fedcore.task import Kind, Loss

CLASSES, TOKENS, STEPS, WIDTH = 5, 11, 6, 8
Targets = Callable[[int, torch.Generator], Tensor]
Outcome = Literal["chain", "vmap", "alone", "refused"]


@dataclass(frozen=True)
class Case:
    """A model with a loss, and what is expected of the two under example-level privacy."""

    name: str
    outcome: Outcome
    model: Callable[[], nn.Module]
    example: Tensor
    targets: Targets
    loss: Loss | None = None
    kind: Kind = "classification"
    preprocess: Callable[[], nn.Module] | None = None
    remedy: str = ""
    """What the refusal must tell to do."""


def classes(count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=rng)


def tokens(count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(TOKENS, (count, STEPS), generator=rng)


def numbers(*shape: int) -> Targets:
    return lambda count, rng: torch.randn(count, *shape, generator=rng)


def signs(*shape: int) -> Targets:
    return lambda count, rng: torch.randint(2, (count, *shape), generator=rng).float()


FEATURES = torch.zeros(WIDTH)
IMAGE = torch.zeros(2, 8, 8)
SIGNAL = torch.zeros(2, 16)
VOLUME = torch.zeros(2, 5, 5, 5)
WINDOW = torch.zeros(STEPS, WIDTH)
SENTENCE = torch.zeros(STEPS, dtype=torch.long)


class Model(nn.Module):
    """Layers by name, and a forward pass over them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def made(
    forward: Callable[[Any, Tensor], Tensor], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    return lambda: Model(forward, **{name: build() for name, build in layers.items()})


def dense(inputs: int = WIDTH, outs: int = CLASSES) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outs)


def embedding() -> nn.Module:
    return nn.Embedding(TOKENS, WIDTH)


def mlp(outs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, outs))


def cnn(*between: nn.Module) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


def many_filters() -> nn.Module:
    """Few places, many weights: norms come from products of rows with each other."""
    return nn.Sequential(
        nn.Conv2d(2, 24, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(96, CLASSES)
    )


def sequence(layer: nn.Module) -> nn.Module:
    """A recurrent layer over a window, and what its last step says."""
    return Model(lambda m, x: m.head(m.layer(x)[0][:, -1]), layer=layer, head=dense()())


def attention(layer: nn.Module, *, turned: bool = False) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if turned else x
        x = m.layer(x, x, x, need_weights=False)[0]
        x = x.transpose(0, 1) if turned else x
        return m.head(x.mean(1))  # type: ignore[no-any-return]

    return Model(forward, layer=layer, head=dense()())


def language_model(
    forward: Callable[[Any, Tensor], Tensor], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    return made(forward, table=embedding, head=dense(WIDTH, TOKENS), **layers)


def _positions(m: Any, x: Tensor) -> Tensor:
    places = m.places(torch.arange(x.shape[1], device=x.device))
    return m.head(torch.relu(m.table(x) + places))


def _causal(m: Any, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return m.head(m.block(m.table(x), src_mask=mask, is_causal=True))  # type: ignore[no-any-return]


def _tied(m: Any, x: Tensor) -> Tensor:
    return functional.linear(torch.tanh(m.mix(m.table(x))), m.table.weight)


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)


class Adapter(nn.Module):
    """A frozen dense layer, with an adapter of low rank merged into its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, CLASSES).requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(2, WIDTH))
        self.up = nn.Parameter(0.3 * torch.randn(CLASSES, 2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.inner(x)))  # type: ignore[no-any-return]


def _frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


def _branches(m: Any, x: Tensor) -> Tensor:
    return m.first(x) if bool((x.sum(dim=1) > 0).all()) else m.second(x)  # type: ignore[no-any-return]


def _rows_as_batch(m: Any, x: Tensor) -> Tensor:
    count, steps, width = x.shape
    hidden = torch.relu(m.first(x.reshape(count * steps, width)))
    return m.second(hidden).view(count, steps, -1).mean(1)  # type: ignore[no-any-return]


def _frames(m: Any, x: Tensor) -> Tensor:
    count, channels = x.shape[:2]
    hidden = m.layer(x.flatten(0, 1).unsqueeze(1)).relu().mean((2, 3))
    return m.head(hidden.view(count, channels * 4))  # type: ignore[no-any-return]


def _checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(m.norm(checkpoint(m.inner, x, use_reentrant=reentrant)))  # type: ignore[no-any-return]

    return forward


def recomputed(reentrant: bool) -> Callable[[], nn.Module]:
    return made(
        _checkpointed(reentrant),
        stem=dense(WIDTH, 16),
        inner=nn.Tanh,
        norm=lambda: nn.LayerNorm(16),
        head=dense(16),
    )


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


# Losses.

_WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])


def weighted_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    each = functional.cross_entropy(outputs, targets, reduction="none")
    return (_WEIGHTS[targets] * each).mean()


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


def _conv1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 3, dilation=2), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten()),
        nn.Linear(24, CLASSES),
    )


def _conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(81, CLASSES))


def _transposed() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 4, stride=4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, stride=2)),
        *(nn.Flatten(), nn.Linear(32, CLASSES)),
    )


def _grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, CLASSES)),
    )


def _weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(WIDTH, 16)), nn.Tanh(), nn.Linear(16, CLASSES)
    )


def _spectral() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(WIDTH, 16)), nn.Tanh(), nn.Linear(16, CLASSES)
    )


_BATCH_MEAN = made(
    lambda m, x: m.second((h := m.first(x)) - h.mean(0, keepdim=True)),
    first=dense(WIDTH, 16),
    second=dense(16),
)
_BATCH_NORM = made(
    lambda m, x: m.second(functional.batch_norm(m.first(x), None, None, training=True)),
    first=dense(WIDTH, 16),
    second=dense(16),
)
_APART = "treat each example alone"
_DIVIDE = "divide by the number of examples"

CASES: tuple[Case, ...] = (
    # Dense layers, and losses over them.
    Case("mlp", "chain", mlp, FEATURES, classes),
    Case("mlp, CrossEntropyLoss()", "chain", mlp, FEATURES, classes, nn.CrossEntropyLoss()),
    Case("mlp, label smoothing", "chain", mlp, FEATURES, classes, smoothed),
    Case("mlp, (w * l).mean()", "chain", mlp, FEATURES, classes, weighted_mean),
    Case("mlp, focal", "chain", mlp, FEATURES, classes, focal),
    Case("mlp, nll", "chain", mlp, FEATURES, classes, log_likelihood),
    Case(
        *("mlp, squared error", "chain", lambda: mlp(3), FEATURES, numbers(3)),
        kind="regression",
    ),
    Case(
        *("mlp, Huber", "chain", lambda: mlp(3), FEATURES, numbers(3), nn.HuberLoss()),
        kind="regression",
    ),
    Case(
        *("mlp, absolute error", "chain", lambda: mlp(3), FEATURES, numbers(3), nn.L1Loss()),
        kind="regression",
    ),
    Case(
        *("mlp, bce", "chain", lambda: mlp(3), FEATURES, signs(3), nn.BCEWithLogitsLoss()),
        kind="regression",
    ),
    Case("residual block", "vmap", Residual, FEATURES, classes),
    Case("frozen layer", "vmap", _frozen, FEATURES, classes),
    Case("low-rank adapter", "vmap", Adapter, FEATURES, classes),
    Case(
        "unused head",
        "vmap",
        made(lambda m, x: m.used(x), used=dense(), unused=dense()),
        FEATURES,
        classes,
    ),
    Case(
        "dropout",
        "vmap",
        lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES)),
        FEATURES,
        classes,
    ),
    Case(
        "in-place relu",
        "chain",
        lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)),
        FEATURES,
        classes,
    ),
    Case("weight_norm", "vmap", _weight_normed, FEATURES, classes),
    Case(
        "branches on values",
        "refused",
        made(_branches, first=dense(), second=dense()),
        FEATURES,
        classes,
        remedy=_APART,
    ),
    Case("checkpointing", "alone", recomputed(False), FEATURES, classes),
    Case("reentrant checkpointing", "alone", recomputed(True), FEATURES, classes),
    # Images, signals, volumes.
    Case("cnn", "chain", cnn, IMAGE, classes),
    Case("cnn, many filters", "chain", many_filters, IMAGE, classes),
    Case("cnn, group norm", "vmap", lambda: cnn(nn.GroupNorm(2, 4)), IMAGE, classes),
    Case(
        "cnn, instance norm",
        "alone",
        lambda: cnn(nn.InstanceNorm2d(4, affine=True)),
        IMAGE,
        classes,
    ),
    Case("cnn, dropout2d", "vmap", lambda: cnn(nn.Dropout2d(0.5)), IMAGE, classes),
    Case("cnn, grouped", "vmap", _grouped, IMAGE, classes),
    Case("conv1d", "vmap", _conv1d, SIGNAL, classes),
    Case("conv3d", "vmap", _conv3d, VOLUME, classes),
    Case("transposed convolution", "vmap", _transposed, IMAGE, classes),
    Case(
        "convolution over flatten(0, 1)",
        "vmap",
        made(_frames, layer=lambda: nn.Conv2d(1, 4, 3), head=dense(8)),
        IMAGE,
        classes,
    ),
    # Sequences.
    Case(
        "lstm", "vmap", lambda: sequence(nn.LSTM(WIDTH, WIDTH, batch_first=True)), WINDOW, classes
    ),
    Case("gru", "vmap", lambda: sequence(nn.GRU(WIDTH, WIDTH, batch_first=True)), WINDOW, classes),
    Case("rnn", "vmap", lambda: sequence(nn.RNN(WIDTH, WIDTH, batch_first=True)), WINDOW, classes),
    Case(
        "Opacus' lstm",
        "vmap",
        lambda: sequence(DPLSTM(WIDTH, WIDTH, batch_first=True)),
        WINDOW,
        classes,
    ),
    Case(
        "Opacus' gru",
        "vmap",
        lambda: sequence(DPGRU(WIDTH, WIDTH, batch_first=True)),
        WINDOW,
        classes,
    ),
    Case(
        "attention",
        "vmap",
        lambda: attention(nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
        WINDOW,
        classes,
    ),
    Case(
        "attention, turned",
        "vmap",
        lambda: attention(nn.MultiheadAttention(WIDTH, 2), turned=True),
        WINDOW,
        classes,
    ),
    Case(
        "Opacus' attention, turned",
        "vmap",
        lambda: attention(DPMultiheadAttention(WIDTH, 2), turned=True),
        WINDOW,
        classes,
    ),
    Case(
        "transformer block",
        "vmap",
        made(lambda m, x: m.head(m.block(x).mean(1)), block=transformer, head=dense()),
        WINDOW,
        classes,
    ),
    Case(
        "windows as rows of a batch",
        "vmap",
        made(_rows_as_batch, first=dense(WIDTH, 16), second=dense(16)),
        WINDOW,
        classes,
    ),
    Case(
        "language model, positions",
        "vmap",
        language_model(_positions, places=lambda: nn.Embedding(STEPS, WIDTH)),
        SENTENCE,
        tokens,
        kind="next_token",
    ),
    Case(
        "language model, causal attention",
        "vmap",
        language_model(_causal, block=transformer),
        SENTENCE,
        tokens,
        kind="next_token",
    ),
    Case(
        "language model, tied weights",
        "vmap",
        made(_tied, table=embedding, mix=dense(WIDTH, WIDTH)),
        SENTENCE,
        tokens,
        kind="next_token",
    ),
    Case(
        "language model, masked by length",
        "vmap",
        language_model(_positions, places=lambda: nn.Embedding(STEPS, WIDTH)),
        SENTENCE,
        tokens,
        masked_by_length,
        kind="next_token",
    ),
    Case(
        "bag of tokens",
        "vmap",
        made(
            lambda m, x: m.head(m.bag(x)), bag=lambda: nn.EmbeddingBag(TOKENS, WIDTH), head=dense()
        ),
        SENTENCE,
        classes,
    ),
    Case(
        "sparse embedding",
        "alone",
        made(
            lambda m, x: m.head(m.table(x).mean(1)),
            table=lambda: nn.Embedding(TOKENS, WIDTH, sparse=True),
            head=dense(),
        ),
        SENTENCE,
        classes,
    ),
    # Preprocessing.
    Case("standardised by example", "chain", mlp, FEATURES, classes, preprocess=ByExample),
    Case("spectrum", "chain", lambda: nn.Linear(18, CLASSES), SIGNAL, classes, preprocess=Spectrum),
    Case(
        "short-time spectrum",
        "chain",
        lambda: nn.Linear(25, CLASSES),
        SIGNAL,
        classes,
        preprocess=ShortTime,
    ),
    # State and coupling that made-up examples may not show.
    Case("coupled for unusual values", "alone", CoupledForSome, FEATURES, classes),
    Case(
        "a mean kept for unusual values",
        "alone",
        lambda: Remembering(rarely=True),
        FEATURES,
        classes,
    ),
    Case("a buffer moved by unusual values", "alone", RareBuffer, FEATURES, classes),
    # What is refused: models.
    Case("mean over the batch", "refused", _BATCH_MEAN, FEATURES, classes, remedy=_APART),
    Case("functional batch_norm", "refused", _BATCH_NORM, FEATURES, classes, remedy="batch of one"),
    Case(
        "softmax over the batch",
        "refused",
        made(lambda m, x: m.head(torch.softmax(x, 0)), head=dense()),
        FEATURES,
        classes,
        remedy=_APART,
    ),
    Case(
        "BatchNorm1d",
        "refused",
        lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)),
        FEATURES,
        classes,
        remedy="GroupNorm",
    ),
    Case(
        "BatchNorm2d", "refused", lambda: cnn(nn.BatchNorm2d(4)), IMAGE, classes, remedy="GroupNorm"
    ),
    Case(
        "InstanceNorm2d with running statistics",
        "refused",
        lambda: cnn(nn.InstanceNorm2d(4, track_running_stats=True)),
        IMAGE,
        classes,
        remedy="track_running_stats=False",
    ),
    Case(
        "attention over the batch",
        "refused",
        lambda: attention(nn.MultiheadAttention(WIDTH, 2)),
        WINDOW,
        classes,
        remedy="batch_first=True",
    ),
    Case(
        "Opacus' attention over the batch",
        "refused",
        lambda: attention(DPMultiheadAttention(WIDTH, 2)),
        WINDOW,
        classes,
        remedy="batch_first=True",
    ),
    Case(
        "recurrence over the batch",
        "refused",
        made(
            lambda m, x: m.head(m.layer(x)[0][:, -1]),
            layer=lambda: nn.GRU(WIDTH, WIDTH),
            head=dense(),
        ),
        WINDOW,
        classes,
        remedy="batch_first=True",
    ),
    Case(
        "coupled while training", "refused", CoupledWhileTraining, FEATURES, classes, remedy=_APART
    ),
    Case(
        "spectral_norm", "refused", _spectral, FEATURES, classes, remedy="use layers that keep none"
    ),
    Case(
        "a counter in a buffer",
        "refused",
        Counting,
        FEATURES,
        classes,
        remedy="use layers that keep none",
    ),
    Case("a mean kept in an attribute", "refused", Remembering, FEATURES, classes, remedy=_APART),
    Case("examples kept in a list", "refused", Listing, FEATURES, classes, remedy=_APART),
    # What is refused: losses.
    Case(
        "CrossEntropyLoss(weight)",
        "refused",
        mlp,
        FEATURES,
        classes,
        nn.CrossEntropyLoss(weight=_WEIGHTS),
        remedy=_DIVIDE,
    ),
    Case(
        "masked by batch",
        "refused",
        language_model(_positions, places=lambda: nn.Embedding(STEPS, WIDTH)),
        SENTENCE,
        tokens,
        masked_by_batch,
        kind="next_token",
        remedy="each example's own",
    ),
    Case(
        "root of the mean",
        "refused",
        lambda: mlp(3),
        FEATURES,
        numbers(3),
        root_of_mean,
        kind="regression",
        remedy="the mean itself",
    ),
    Case("sum by batch size", "refused", mlp, FEATURES, classes, sum_by_batch_size, remedy=_DIVIDE),
    Case(
        "summed",
        "refused",
        mlp,
        FEATURES,
        classes,
        nn.CrossEntropyLoss(reduction="sum"),
        remedy=_DIVIDE,
    ),
    Case(
        "contrastive",
        "refused",
        lambda: mlp(3),
        FEATURES,
        numbers(3),
        contrastive,
        kind="regression",
        remedy="no terms between",
    ),
    Case(
        "ranking",
        "refused",
        lambda: mlp(1),
        FEATURES,
        numbers(1),
        ranking,
        kind="regression",
        remedy="no terms between",
    ),
    Case("focal by batch", "refused", mlp, FEATURES, classes, focal_by_batch, remedy=_DIVIDE),
    Case(
        "weights by classes seen", "refused", mlp, FEATURES, classes, ClassCounts(), remedy="loss"
    ),
    # What is refused: preprocessing.
    Case(
        "standardised by batch",
        "refused",
        mlp,
        FEATURES,
        classes,
        preprocess=ByBatch,
        remedy=_APART,
    ),
    Case(
        "scaled by the largest seen",
        "refused",
        mlp,
        FEATURES,
        classes,
        preprocess=RunningScale,
        remedy=_APART,
    ),
    Case(
        "BatchNorm1d before the model",
        "refused",
        mlp,
        FEATURES,
        classes,
        preprocess=lambda: nn.BatchNorm1d(WIDTH, affine=False),
        remedy="GroupNorm",
    ),
)
