"""What was measured of the candidates, and the records that the choice and the report read.

Start with `records_of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset

from fedcore.artifacts.manifest import Parity
from fedcore.artifacts.parity import FloatArray
from fedcore.config.run import RunConfig
from fedcore.files import sha256_hex
from fedcore.observability.words import counted
from fedcore.task.definition import Examples, Task
from fedcore.task.kinds.protocol import Kind
from fedcore.task.metrics import Metric
from server.cloud import CloudData
from server.compression.candidates import FP32, Built
from server.compression.confidence import (
    changed_decisions,
    confidence_of_each,
    disagreement_bound,
    is_accuracy,
    loss_bound,
    probe_count,
    probe_inputs,
)
from server.compression.runtime import answer, open_session
from server.compression.timing import CandidateTiming
from server.records import CandidateRecord
from server.rounds.evaluation.judgement import drop_of
from server.rounds.evaluation.pooling import EvaluationAnswer


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A candidate that was built and evaluated."""

    built: Built
    golden: FloatArray
    max_abs_error: float
    heldout: FloatArray | None
    """Outputs for the cloud's held-out data; None without such data."""
    targets: Tensor | None
    """Targets of the held-out data."""
    metric: float
    clients: Mapping[str, EvaluationAnswer] | None
    """Measurements by clients, by name; None if clients weren't asked."""
    undecoded: str = ""
    """Why the file of a next-token model has no decode graph; empty if it has, or needs none."""


@dataclass(frozen=True)
class Loss:
    """An upper bound on a candidate's loss against fp32, and its evidence in words."""

    bound: float
    evidence: str


NOT_NEEDED = "not needed"
"""Begins the reason of a candidate that was not built because another one does."""
_UNTIMED = CandidateTiming(math.nan, math.nan, math.nan)


class LossBounds:
    """Bounds on the losses of candidates, each computed once."""

    def __init__(self, run: RunConfig, task: Task, base: Evaluated, cloud: CloudData) -> None:
        self._run, self._task, self._base, self._cloud = run, task, base, cloud
        self._probes: dict[bool, tuple[NDArray[np.generic], FloatArray]] = {}
        self._found: dict[bytes, Loss] = {}

    def of(self, each: Evaluated, drop: float) -> Loss:
        """Returns the bound on a candidate's loss, at `server.compression.confidence.CONFIDENCE`.

        It is that of the cloud's held-out examples, or of those that clients measured. Where these
        are too few for ``compression.max_accuracy_drop``, and the metric is the accuracy, changed
        decisions on inputs without labels may give a lower one. Each of these bounds has the
        confidence that the lowest one needs to hold (`confidence_of_each`).
        """
        onnx = each.built.onnx
        if onnx not in self._found:
            self._found[onnx] = self._bound(each, drop)
        return self._found[onnx]

    def _bound(self, each: Evaluated, drop: float) -> Loss:
        base, limit = self._base, self._run.compression.max_accuracy_drop
        assert base.heldout is not None
        assert each.heldout is not None
        assert each.targets is not None
        primary = self._task.primary
        shown = self._task.problem.presentation
        measured = bool(base.clients and each.clients)
        accurate = is_accuracy(base.metric, shown, base.heldout, each.targets)
        # Counts inputs without labels even where they are not asked: that depends on the others.
        sure = confidence_of_each(1 + measured + accurate)
        bound = loss_bound(
            primary, shown, base.heldout, each.heldout, each.targets, confidence=sure
        )
        loss = Loss(bound, counted(len(each.targets), "held-out example"))
        if base.clients and each.clients:
            on_clients = drop_of(primary, base.clients, each.clients, few=True, confidence=sure)
            said = f"the held-out examples of {counted(len(each.clients), 'client')}"
            loss = min(loss, Loss(on_clients, said), key=lambda one: one.bound)
        if drop > limit or loss.bound <= limit or not accurate:
            return loss
        # It agrees with fp32 more where it was fitted to: on the training part.
        built = each.built
        inputs, expected = self._probed(heldout_alone=built.retrained or built.fitted)
        found = self._answers(each, inputs)
        changed = changed_decisions(expected, found, shown)
        probed = Loss(
            disagreement_bound(changed, confidence=sure),
            f"{counted(len(inputs), 'input')} without labels, of which the answer to "
            f"{int((changed > 0).sum())} changed",
        )
        return min(loss, probed, key=lambda one: one.bound)

    def _probed(self, *, heldout_alone: bool) -> tuple[NDArray[np.generic], FloatArray]:
        if heldout_alone not in self._probes:
            parts = [self._cloud.heldout, *([] if heldout_alone else [self._cloud.train])]
            pool: Examples = ConcatDataset(parts)
            count = probe_count(self._run.compression.max_accuracy_drop)
            inputs = probe_inputs(pool, count=count, seed=self._run.seed)
            self._probes[heldout_alone] = inputs, self._answers(self._base, inputs)
        return self._probes[heldout_alone]

    def _answers(self, each: Evaluated, inputs: NDArray[np.generic]) -> FloatArray:
        return answer(open_session(each.built.onnx, threads=self._run.serving.threads), inputs)


def records_of(
    evaluated: Mapping[str, Evaluated],
    timings: Mapping[str, CandidateTiming],
    metric: Metric,
    kind: Kind,
    bounds: LossBounds | None,
) -> list[CandidateRecord]:
    """Returns each candidate's figures relative to fp32; verdicts are still open.

    Args:
        evaluated: The candidates, fp32 among them.
        timings: Their latencies; NaN where one is not known yet.
        metric: The primary metric.
        kind: The task's kind of problem.
        bounds: Bounds their losses; None without held-out data.
    """
    base = evaluated[FP32.name]
    found = [
        CandidateRecord(
            name=name,
            metric=each.metric,
            drop=0.0 if each is base else metric.worsening(base.metric, each.metric),
            agreement=(
                1.0
                if each.heldout is None or base.heldout is None
                else kind.agreement(base.heldout, each.heldout)
            ),
            max_abs_error=each.max_abs_error,
            bytes=len(each.built.onnx),
            sha256=sha256_hex(each.built.onnx),
            p50_us=timings.get(name, _UNTIMED).p50_us,
            p50_min_us=timings.get(name, _UNTIMED).p50_min_us,
            p50_max_us=timings.get(name, _UNTIMED).p50_max_us,
            admitted=False,
            reason="",
            clients_drop=_clients_drop(metric, base, each),
        )
        for name, each in evaluated.items()
    ]
    if bounds is None:
        return found
    losses = {
        each.name: Loss(0.0, "")
        if each.name == FP32.name
        else bounds.of(evaluated[each.name], each.drop)
        for each in found
    }
    return [
        replace(each, drop_bound=losses[each.name].bound, evidence=losses[each.name].evidence)
        for each in found
    ]


def _clients_drop(metric: Metric, base: Evaluated, each: Evaluated) -> float | None:
    if base.clients is None or each.clients is None:
        return None
    return 0.0 if each is base else drop_of(metric, base.clients, each.clients)


def unbuilt_records(reasons: Mapping[str, str]) -> dict[str, CandidateRecord]:
    """Returns records of candidates that weren't built; NaN, as 0 would look like a measurement."""
    return {
        name: CandidateRecord(
            name=name,
            metric=math.nan,
            drop=math.nan,
            agreement=math.nan,
            max_abs_error=math.nan,
            bytes=0,
            sha256="",
            p50_us=math.nan,
            p50_min_us=math.nan,
            p50_max_us=math.nan,
            admitted=False,
            reason=reason,
        )
        for name, reason in reasons.items()
    }


def parity_of(chosen: CandidateRecord, fp32: CandidateRecord, metric: Metric | None) -> Parity:
    """Returns the manifest's parity figures; the metric is ``none`` without data to evaluate on."""
    return Parity(
        max_abs_error=chosen.max_abs_error,
        agreement=chosen.agreement,
        metric=metric.name if metric else "none",
        metric_before=fp32.metric if metric else 0.0,
        metric_after=chosen.metric if metric else 0.0,
    )
