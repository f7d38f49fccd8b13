"""How much worse than fp32 a candidate may be beyond the examples that measured it.

A few held-out examples show a loss of nothing where there is one: 20 of them miss a loss of a point
in four of five draws. A candidate is therefore admitted by an upper bound on its loss. Start with
`loss_bound`; `disagreement_bound` is the evidence of inputs without labels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv, stdtrit
from torch import Tensor

from fedcore.artifacts.parity import FloatArray
from fedcore.artifacts.presentation import Presentation, decisions
from fedcore.seeds import numpy_rng
from fedcore.task.definition import Examples, size_of
from fedcore.task.measured import measure_outputs
from fedcore.task.metrics import Metric
from fedcore.training.batches import gather
from server.rounds.evaluation.judgement import unseen_loss

CONFIDENCE = 0.95
"""One-sided confidence of the bounds."""
_GROUPS = 40
"""Most groups of the jackknife; each costs two computations of the metric."""
_LEAST_PROBES, _MOST_PROBES = 100, 1000
_MIX = 0.2  # both parameters of the Beta distribution of shares: most mixtures are nearly one input


def loss_bound(
    metric: Metric,
    presentation: Presentation,
    reference: FloatArray,
    candidate: FloatArray,
    targets: Tensor,
    *,
    confidence: float = CONFIDENCE,
) -> float:
    """Returns an upper bound on how much worse a candidate's metric is than fp32's.

    The bound is one-sided, at ``confidence``, and paired: both models answer the same examples. The
    standard error is that of the jackknife that leaves out one group of examples at a time, which
    needs nothing of the metric but its value. Where the metric is of decisions, losses are rare and
    large: the bound is raised for their skewness, and by a loss that no example would have shown,
    so that few examples without a change are no proof.

    Args:
        metric: The primary metric.
        presentation: How devices tell an answer: ``values``, or decisions.
        reference: Outputs ``(N, ...)`` of fp32.
        candidate: Outputs of the candidate, of the same shape.
        targets: Targets ``(N, ...)``.
        confidence: The confidence of the bound.

    Returns:
        The bound, as `Metric.worsening` measures; infinite for fewer than two examples, and where
        the metric of a part of them is no number.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11 (jackknife);
        Johnson 1978, doi:10.1080/01621459.1978.10480051 (skewness); `unseen_loss`.
    """
    before, after, count = torch.from_numpy(reference), torch.from_numpy(candidate), len(targets)
    loss = _worsening(metric, before, after, targets)
    groups = min(count, _GROUPS)
    if groups < 2:
        return math.inf
    without = []
    for group in range(groups):
        rows = torch.arange(count) % groups != group
        without.append(_worsening(metric, before[rows], after[rows], targets[rows]))
    scale = float(stdtrit(groups - 1, confidence))
    margin = scale * math.sqrt((groups - 1) * float(np.var(without)))
    if presentation != "values" and metric.higher_is_better:
        unseen = unseen_loss(count, confidence) / max(1, targets[0].numel())
        margin = math.hypot(margin, unseen) + _skewness_margin(np.array(without), scale)
    bound = loss + margin
    return bound if math.isfinite(bound) else math.inf


def _skewness_margin(without: NDArray[np.float64], scale: float) -> float:
    """Returns by how much rare, large losses raise a bound of ``scale`` standard errors; >= 0."""
    groups = len(without)
    apart = (groups - 1) * (without.mean() - without)
    square = float(np.mean(apart**2))
    if not square > 0:
        return 0.0
    return max(0.0, (1 + 2 * scale**2) * float(np.mean(apart**3)) / (6 * square * groups))


def _worsening(metric: Metric, before: Tensor, after: Tensor, targets: Tensor) -> float:
    """Returns how much worse the second outputs are; NaN where the metric is undefined."""
    values = (measure_outputs([metric], each, targets).score(metric) for each in (before, after))
    return metric.worsening(*values)


def confidence_of_each(count: int) -> float:
    """Returns the confidence that each of ``count`` bounds needs, so that all hold at `CONFIDENCE`.

    The lowest of several bounds is too low as soon as one of them is. How many there are must not
    depend on their values.

    Source:
        Bonferroni's inequality: Dunn 1961, doi:10.1080/01621459.1961.10482090.
    """
    return 1 - (1 - CONFIDENCE) / count


def disagreement_bound(changed: NDArray[np.float64], *, confidence: float = CONFIDENCE) -> float:
    """Returns an upper bound on the share of decisions in which two models differ.

    No accuracy can be lost in a decision that is the same, so it bounds the loss of accuracy, too.

    Args:
        changed: The share of changed decisions of each input, shape ``(N,)``, N >= 1.
        confidence: The one-sided confidence of the bound.

    Source:
        Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404.
    """
    count = len(changed)
    hits = math.ceil(float(changed.sum()) - 1e-9)
    return 1.0 if hits >= count else float(betaincinv(hits + 1, count - hits, confidence))


def changed_decisions(
    reference: FloatArray, candidate: FloatArray, presentation: Presentation
) -> NDArray[np.float64]:
    """Returns, for each input, the share ``(N,)`` of decisions that differ."""
    differ = decisions(reference, presentation) != decisions(candidate, presentation)
    shares: NDArray[np.float64] = differ.reshape(len(differ), -1).mean(axis=1)
    return shares


def is_accuracy(
    value: float, presentation: Presentation, outputs: FloatArray, targets: Tensor
) -> bool:
    """Returns whether a metric is the share of right decisions, by its value for these outputs.

    Changed decisions bound the loss of such a metric, but not that of others, such as a mean over
    classes.
    """
    decided, wanted = decisions(outputs, presentation), targets.numpy().reshape(len(targets), -1)
    flat = decided.reshape(len(decided), -1)
    if presentation == "values" or flat.shape != wanted.shape:
        return False
    return math.isclose(value, float((flat == wanted).mean()), rel_tol=1e-9)


def probe_count(limit: float) -> int:
    """Returns how many inputs without labels a bound of ``limit`` needs, within reason."""
    wanted = math.ceil(10 / limit) if limit > 0 else _MOST_PROBES
    return min(max(wanted, _LEAST_PROBES), _MOST_PROBES)


def probe_inputs(examples: Examples, *, count: int, seed: int) -> NDArray[np.generic]:
    """Returns inputs ``(count, ...)`` without labels: real ones, or mixtures of two.

    As many real inputs are drawn as are asked for. Where there are fewer, each probe is drawn from
    the neighbourhood of the data: a mixture of two inputs, most of it one of them; for integers
    (tokens, pixels) the start of one and the rest of the other.

    Args:
        examples: The examples whose inputs are used.
        count: Number of inputs.
        seed: The run's seed.

    Source:
        Chapelle et al. 2000, Vicinal Risk Minimization; Zhang et al. 2018, arXiv:1710.09412.
    """
    rng, size = numpy_rng(seed, "probes"), size_of(examples)
    if size >= count:
        rows = torch.from_numpy(rng.permutation(size)[:count])
        return gather(examples, rows)[0].numpy()
    return mixed_examples(examples, count=count, rng=rng)[0].numpy()


def mixed_examples(
    examples: Examples, *, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Returns mixtures ``(count, ...)`` of two inputs each, and the targets of the larger share."""
    pairs = torch.from_numpy(rng.integers(0, size_of(examples), (2, count)))
    share = rng.beta(_MIX, _MIX, count)
    share = np.maximum(share, 1 - share)
    (one, targets), (other, _) = (gather(examples, rows) for rows in pairs)
    if one.is_floating_point():
        weight = torch.from_numpy(share).to(one.dtype).reshape(-1, *[1] * (one.dim() - 1))
        return weight * one + (1 - weight) * other, targets
    flat = one.reshape(count, -1)
    start = torch.arange(flat.shape[1]) < torch.from_numpy(share[:, None] * flat.shape[1])
    mixed = torch.where(start, flat, other.reshape(count, -1))
    return mixed.reshape(one.shape), targets
