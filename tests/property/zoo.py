"""The zoo of the sensitivity probe: models and losses, with what becomes of each under privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import Tensor, nn

from fedcore.task.definition import Loss
from fedcore.task.kinds.registry import KindName
from tests.property import zoo_models as m
from tests.property import zoo_state as s
from tests.property.zoo_models import CLASSES, STEPS, TOKENS, WIDTH, made

Targets = Callable[[int, torch.Generator], Tensor]
Outcome = Literal["chain", "vmap", "alone", "refused"]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """A model with a loss, and what is expected of the two under example-level privacy."""

    name: str
    outcome: Outcome
    model: Build
    example: Tensor
    targets: Targets
    loss: Loss | None = None
    kind: KindName = "classification"
    preprocess: Build | None = None
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


FEATURES, IMAGE, SIGNAL = torch.zeros(WIDTH), torch.zeros(2, 8, 8), torch.zeros(2, 16)
VOLUME, WINDOW = torch.zeros(2, 5, 5, 5), torch.zeros(STEPS, WIDTH)
SENTENCE = torch.zeros(STEPS, dtype=torch.long)


def regression(outs: int) -> Build:
    return lambda: m.mlp(outs)


def normed(layer: Build) -> Build:
    return lambda: m.cnn(layer())


def recurrent(kind: Callable[..., nn.Module]) -> Build:
    return lambda: m.sequence(kind(WIDTH, WIDTH, batch_first=True))


def attention(kind: Callable[..., nn.Module], *, turned: bool = False, **more: Any) -> Build:
    return lambda: m.attention(kind(WIDTH, 2, **more), turned=turned)


def bag() -> nn.Module:
    return nn.EmbeddingBag(TOKENS, WIDTH)


def sparse() -> nn.Module:
    return nn.Embedding(TOKENS, WIDTH, sparse=True)


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES))


def in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES))


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))


LANGUAGE = m.language_model(m.positions, places=lambda: nn.Embedding(STEPS, WIDTH))
TWO = {"first": m.dense(), "second": m.dense()}


def _accepted() -> Iterator[Case]:
    dense: list[tuple[str, Outcome, Build]] = [
        ("residual block", "chain", m.Residual),
        ("frozen layer", "vmap", m.frozen),
        ("low-rank adapter", "vmap", m.Adapter),
        ("unused head", "vmap", made(lambda n, x: n.first(x), **TWO)),
        ("dropout", "chain", dropped),
        ("in-place relu", "chain", in_place),
        ("weight_norm", "vmap", m.weight_normed),
        ("checkpointing", "chain", m.recomputed(False)),
        ("reentrant checkpointing", "chain", m.recomputed(True)),
        # What made-up examples do not show.
        ("coupled for unusual values", "alone", s.CoupledForSome),
        ("a mean kept for unusual values", "alone", lambda: s.Remembering(rarely=True)),
        ("a buffer moved by unusual values", "alone", s.RareBuffer),
    ]
    for name, outcome, model in dense:
        yield Case(name, outcome, model, FEATURES, classes)
    losses: list[tuple[str, Loss | None]] = [
        *(("cross-entropy", None), ("nn.CrossEntropyLoss()", nn.CrossEntropyLoss())),
        *(("label smoothing", s.smoothed), ("(w * l).mean()", s.weighted_mean)),
        *(("focal", s.focal), ("negative log-likelihood", s.log_likelihood)),
    ]
    for name, loss in losses:
        yield Case(f"mlp, {name}", "chain", m.mlp, FEATURES, classes, loss)
    errors: list[tuple[str, Loss | None]] = [
        *(("squared error", None), ("Huber", nn.HuberLoss()), ("absolute error", nn.L1Loss())),
        ("binary cross-entropy", nn.BCEWithLogitsLoss()),
    ]
    for name, loss in errors:
        targets = signs(3) if name.startswith("binary") else numbers(3)
        yield Case(f"mlp, {name}", "chain", regression(3), FEATURES, targets, loss, "regression")
    images: list[tuple[str, Outcome, Build]] = [
        ("cnn", "chain", m.cnn),
        ("cnn, many filters", "chain", m.many_filters),
        ("cnn, group norm", "chain", normed(lambda: nn.GroupNorm(2, 4))),
        ("cnn, instance norm", "chain", normed(lambda: nn.InstanceNorm2d(4, affine=True))),
        ("cnn, dropout2d", "vmap", normed(lambda: nn.Dropout2d(0.5))),
        ("cnn, grouped", "vmap", m.grouped),
        ("transposed convolution", "vmap", m.transposed),
        ("convolution over flatten(0, 1)", "vmap", m.by_frames),
    ]
    for name, outcome, model in images:
        yield Case(name, outcome, model, IMAGE, classes)
    yield Case("conv1d", "vmap", m.conv1d, SIGNAL, classes)
    yield Case("conv3d", "vmap", m.conv3d, VOLUME, classes)
    block = made(lambda n, x: n.head(n.block(x).mean(1)), block=m.transformer, head=m.dense())
    windows: list[tuple[str, Build]] = [
        *(("lstm", recurrent(nn.LSTM)), ("gru", recurrent(nn.GRU)), ("rnn", recurrent(nn.RNN))),
        *(("Opacus' lstm", recurrent(DPLSTM)), ("Opacus' gru", recurrent(DPGRU))),
        ("attention", attention(nn.MultiheadAttention, batch_first=True)),
        ("attention, turned", attention(nn.MultiheadAttention, turned=True)),
        ("Opacus' attention, turned", attention(DPMultiheadAttention, turned=True)),
        *(("transformer block", block), ("windows as rows of a batch", m.by_rows)),
    ]
    for name, model in windows:
        yield Case(name, "chain" if name in ("lstm", "gru") else "vmap", model, WINDOW, classes)
    tied = made(m.tied, table=m.embedding, mix=m.dense(WIDTH, WIDTH))
    languages: list[tuple[str, Build, Loss | None]] = [
        ("positions", LANGUAGE, None),
        ("causal attention", m.language_model(m.causal, block=m.transformer), None),
        *(("tied weights", tied, None), ("masked by length", LANGUAGE, s.masked_by_length)),
    ]
    for name, model, loss in languages:
        case = f"language model, {name}"
        yield Case(case, "vmap", model, SENTENCE, tokens, loss, "next_token")
    bags = made(lambda n, x: n.head(n.bag(x)), bag=bag, head=m.dense())
    yield Case("bag of tokens", "vmap", bags, SENTENCE, classes)
    table = made(lambda n, x: n.head(n.table(x).mean(1)), table=sparse, head=m.dense())
    yield Case("sparse embedding", "alone", table, SENTENCE, classes)
    for name, model in m.LARGE_TABLES.items():
        yield Case(f"large table, {name}", "vmap", model, SENTENCE, classes)
    by_example = Case("standardised by example", "chain", m.mlp, FEATURES, classes)
    yield Case(**{**vars(by_example), "preprocess": s.ByExample})
    for name, width, before in (("spectrum", 18, s.Spectrum), ("stft", 25, s.ShortTime)):
        head = m.dense(width, CLASSES)
        yield Case(name, "chain", head, SIGNAL, classes, preprocess=before)


_APART, _KEEP_NONE = "treat each example alone", "use layers without such state"
_DIVIDE, _NO_TERMS = "divide by the number of examples", "no terms between"


def _refused() -> Iterator[Case]:
    softmax = made(lambda n, x: n.head(torch.softmax(x, 0)), head=m.dense())
    dense: list[tuple[str, Build, str]] = [
        ("branches on values", made(m.branches, **TWO), _APART),
        ("mean over the batch", m.batch_mean, _APART),
        ("functional batch_norm", m.batch_norm, "batch of one"),
        ("softmax over the batch", softmax, _APART),
        ("BatchNorm1d", batch_normed, "GroupNorm"),
        ("coupled while training", s.CoupledWhileTraining, _APART),
        ("spectral_norm", m.spectral, _KEEP_NONE),
        ("a counter in a buffer", s.Counting, _KEEP_NONE),
        ("a mean kept in an attribute", s.Remembering, _APART),
        ("a mean kept beside dropout", s.remembering_dropout, "keep no counters"),
        ("examples kept in a list", s.Listing, _APART),
    ]
    for name, model, remedy in dense:
        yield Case(name, "refused", model, FEATURES, classes, remedy=remedy)
    tracked = normed(lambda: nn.InstanceNorm2d(4, track_running_stats=True))
    yield Case("tracking", "refused", tracked, IMAGE, classes, remedy="track_running_stats=False")
    normal = normed(lambda: nn.BatchNorm2d(4))
    yield Case("BatchNorm2d", "refused", normal, IMAGE, classes, remedy="GroupNorm")
    across: list[tuple[str, Build]] = [
        ("attention over the batch", attention(nn.MultiheadAttention)),
        ("Opacus' attention over the batch", attention(DPMultiheadAttention)),
        ("recurrence over the batch", lambda: m.sequence(nn.GRU(WIDTH, WIDTH))),
    ]
    for name, model in across:
        yield Case(name, "refused", model, WINDOW, classes, remedy="batch_first=True")
    losses: list[tuple[str, Loss]] = [
        ("CrossEntropyLoss(weight)", nn.CrossEntropyLoss(weight=s.WEIGHTS)),
        ("a sum over the batch", nn.CrossEntropyLoss(reduction="sum")),
        *(("a sum divided by 32", s.sum_by_batch_size), ("focal by batch", s.focal_by_batch)),
        ("weights by classes seen", s.ClassCounts()),
    ]
    for name, loss in losses:
        yield Case(name, "refused", m.mlp, FEATURES, classes, loss, remedy=_DIVIDE)
    errors: list[tuple[str, int, Loss, str]] = [
        ("root of the mean", 3, s.root_of_mean, "the mean itself"),
        *(("contrastive", 3, s.contrastive, _NO_TERMS), ("ranking", 1, s.ranking, _NO_TERMS)),
    ]
    for name, outs, loss, remedy in errors:
        given = FEATURES, numbers(outs), loss, "regression"
        yield Case(name, "refused", regression(outs), *given, remedy=remedy)
    masked = "masked by batch", "refused", LANGUAGE, SENTENCE, tokens, s.masked_by_batch
    yield Case(*masked, "next_token", remedy="each example's own")
    before: list[tuple[str, Build, str]] = [
        ("standardised by batch", s.ByBatch, _APART),
        ("scaled by the largest seen", s.RunningScale, _KEEP_NONE),
        ("BatchNorm1d in front", lambda: nn.BatchNorm1d(WIDTH, affine=False), "GroupNorm"),
    ]
    for name, layer, remedy in before:
        yield Case(name, "refused", m.mlp, FEATURES, classes, preprocess=layer, remedy=remedy)


ACCEPTED, REFUSED = tuple(_accepted()), tuple(_refused())
