"""Compression of a trained model: builds, checks, evaluates and times candidates; chooses one.

In: a run, a task, a model and the cloud's data. Out: a `Compressed`. Start with `compress`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedcore.artifacts.golden import Golden
from fedcore.artifacts.parity import FloatArray, max_abs_error
from fedcore.config.run import RunConfig
from fedcore.errors import CompressionError, FedcoreError, ParityError, TaskError
from fedcore.files import sha256_hex
from fedcore.observability.words import counted
from fedcore.task.adapters import merge_adapters
from fedcore.task.definition import Task, size_of
from fedcore.task.measured import measure_outputs
from fedcore.task.model import checkpoint_bytes
from server.cloud import CloudData
from server.compression.candidates import ALL, FP32, MIXED, STATIC, Built, Candidate, Material
from server.compression.choose import choose, keeps_answers, slower_note
from server.compression.compressed import Compressed
from server.compression.decode.attach import with_decode_graph
from server.compression.decode.errors import NotDecodable
from server.compression.evaluated import (
    NOT_NEEDED,
    Evaluated,
    LossBounds,
    parity_of,
    records_of,
    unbuilt_records,
)
from server.compression.golden import golden_count, golden_inputs, stored, tolerance
from server.compression.missing import missing_in_file
from server.compression.quantise import saturates
from server.compression.reference import reference_of
from server.compression.runtime import answer, answers, open_session
from server.compression.timing import TORCH, time_candidates
from server.rounds.evaluation.judging import MeasureOnnx, clients_judge

EXACT = 1e-3
"""Tolerance for outputs of float32 models, relative to their largest output; covers rounding in
another order. An export beyond it is rejected, and so is a released float32 model in a device's
self-test."""
QUANTISED = 0.05
"""Tolerance for golden outputs of an int8 model on a device, relative to the largest output.
Processors round 8-bit products differently, and one activation step shifts later layers. A
processor that saturates where this one didn't exceeds the tolerance, and must not serve the
model."""


def compress(
    run: RunConfig,
    task: Task,
    model: nn.Module,
    cloud: CloudData | None,
    *,
    progress: Callable[[str], None],
    on_clients: MeasureOnnx | None = None,
    tuning_kept: bool = True,
) -> Compressed:
    """Builds the configured candidates of a trained model, and chooses one for release.

    Args:
        run: ``[compression]``, ``[finetune]``, ``[serving]`` and the seed are used.
        task: The model's task.
        model: The trained full model, on the CPU. Not changed; candidates are built from a copy
            whose low-rank adapters are merged into the weights.
        cloud: The training part calibrates quantisation and retrains pruned models; the held-out
            part evaluates candidates. If either is missing or empty, only fp32 is built.
        progress: Callback at each step, with a line of text for the user.
        on_clients: Evaluates candidates on clients; ``max_accuracy_drop`` then applies to clients
            as well as to the cloud's data. None on devices, which run no file before it is signed:
            where they judge, candidates that are retrained after pruning are then refused.
        tuning_kept: Whether the gate kept the model that was fine-tuned on the cloud's data. Where
            it did not, no candidate is trained on them either.

    Guarantee:
        Equal arguments give byte-identical files, in any process, on machines of one kind with
        equal library versions; those of int8_mixed where ``compression.time_limit_s`` suffices.
        Timings vary, and with them whether ``max_p50_us`` rejects a candidate.

    Raises:
        TaskError: the model can't be exported.
        ParityError: outputs of an exported file differ from those of its source model.
        CompressionError: the model's weights are not finite, or no candidate meets the limits.
    """
    _demand_finite_weights(model)
    if cloud is not None and not (size_of(cloud.train) and size_of(cloud.heldout)):
        cloud = None
    limits = run.compression
    material = _material(run, task, model, cloud, progress, tuning_kept)
    golden = _golden_of(material)
    wanted = [each for each in ALL if each.name in limits.candidates] if cloud else [FP32]
    evaluated, unbuilt, bounds = _evaluate_candidates(
        wanted, material, _Evidence(golden, cloud, on_clients)
    )
    files = {name: each.built.onnx for name, each in evaluated.items()}
    progress(f"timing {', '.join(files)} and torch in turn")
    timings = time_candidates(
        files,
        material.module,
        task.example_input,
        threads=run.serving.threads,
        runs=limits.timing_runs,
    )
    measured = records_of(evaluated, timings, task.primary, task.problem, bounds)
    judged, chosen = choose(measured, limits, unjudged=_unjudged(run, evaluated))
    of = {**{record.name: record for record in judged}, **unbuilt_records(unbuilt)}
    records = tuple(of[candidate.name] for candidate in wanted)
    for record in records:
        progress(f"{record.name}: {record.reason}")

    released = evaluated[chosen]
    built = released.built
    return Compressed(
        records=records,
        chosen=chosen,
        files=files,
        primary=task.primary.name,
        torch_p50_us=timings[TORCH].p50_us,
        parity=parity_of(of[chosen], of[FP32.name], task.primary if cloud else None),
        golden=_stored(material, golden, released, cloud),
        golden_tolerance=tolerance(
            released.golden, relative=QUANTISED if built.in_8_bits else EXACT
        ),
        missing=missing_in_file(
            built.reference,
            task.example_input,
            built.onnx,
            tolerance=tolerance(released.golden, relative=EXACT if built.exact else QUANTISED),
            named=task.named_inputs,
        ),
        calibration=built.calibration,
        notes=_notes(
            cloud,
            chosen,
            released,
            slower_note(of[chosen], measured),
            reduce_range=material.reduce_range,
        ),
        source_sha256=sha256_hex(checkpoint_bytes(model)),
    )


def _material(
    run: RunConfig,
    task: Task,
    model: nn.Module,
    cloud: CloudData | None,
    progress: Callable[[str], None],
    tuning_kept: bool,
) -> Material:
    wanted = run.compression.reduce_range
    return Material(
        run=run,
        task=task,
        module=copy.deepcopy(merge_adapters(model)).eval(),
        examples=cloud.train if cloud else None,
        reduce_range=saturates(_cpuinfo()) if wanted is None else wanted,
        progress=progress,
        untrained=_untrained(run, tuning_kept),
    )


def _untrained(run: RunConfig, tuning_kept: bool) -> str:
    """Returns why no candidate may be trained on the cloud's data; empty if it may."""
    if not run.finetune.epochs:
        return "finetune.epochs = 0 turns training on them off"
    return "" if tuning_kept else "the gate did not keep the model that was fine-tuned on them"


def _golden_of(material: Material) -> NDArray[Any]:
    _ = material.fp32  # refuses a model that fails on its example
    with torch.inference_mode():
        outputs = material.module(material.example_batch)
    task = material.task
    return golden_inputs(
        task.example_input,
        material.examples,
        seed=material.run.seed,
        count=golden_count(task.example_input.nbytes, outputs[0].nbytes),
        named=task.named_inputs,
    )


@dataclass(frozen=True)
class _Evidence:
    """What every candidate is measured on."""

    golden: NDArray[Any]
    cloud: CloudData | None
    on_clients: MeasureOnnx | None


def _stored(
    material: Material, golden: NDArray[Any], released: Evaluated, cloud: CloudData | None
) -> Golden:
    """Returns the golden inputs and outputs of a release, with its reference if there are data."""
    seed, reference = material.run.seed, None
    if cloud is not None:
        reference = reference_of(material.task, cloud.train, released.heldout, seed=seed)
    return replace(stored(golden, released.golden, seed=seed), reference=reference)


def _evaluate_candidates(
    wanted: Sequence[Candidate], material: Material, evidence: _Evidence
) -> tuple[dict[str, Evaluated], dict[str, str], LossBounds | None]:
    """Returns the candidates that were built, by name, why others were not, and bounds on losses.

    The first candidate is fp32.
    """
    evaluated: dict[str, Evaluated] = {}
    unbuilt: dict[str, str] = {}
    bounds: LossBounds | None = None
    for candidate in wanted:
        if candidate is MIXED and _is_needless(evaluated, material, bounds):
            unbuilt[MIXED.name] = f"{NOT_NEEDED}: int8_static keeps its answers with all layers"
            continue
        material.progress(f"building and evaluating {candidate.name}")
        try:
            evaluated[candidate.name] = _evaluate_candidate(candidate, material, evidence)
        except ParityError:
            raise  # the export is wrong, so all its figures are meaningless
        except (CompressionError, TaskError) as error:
            if candidate is FP32:
                raise _without_fp32(error) from error
            unbuilt[candidate.name] = f"refused: {error}"
            material.progress(f"{candidate.name} was not built: {error}")
        if candidate is FP32 and evidence.cloud is not None:
            base = evaluated[FP32.name]
            bounds = LossBounds(material.run, material.task, base, evidence.cloud)
    return evaluated, unbuilt, bounds


def _is_needless(
    evaluated: Mapping[str, Evaluated], material: Material, bounds: LossBounds | None
) -> bool:
    """Returns whether no layer has to stay in float32: int8_static keeps the limits on answers."""
    both: tuple[str, ...] = (FP32.name, STATIC.name)
    some = {name: evaluated[name] for name in both if name in evaluated}
    task, limits = material.task, material.run.compression
    found = records_of(some, {}, task.primary, task.problem, bounds)
    return found[-1].name == STATIC.name and keeps_answers(found[-1], limits)


def _evaluate_candidate(candidate: Candidate, material: Material, evidence: _Evidence) -> Evaluated:
    """Builds a candidate, checks its parity with torch, and evaluates it on held-out data."""
    golden, cloud, on_clients = evidence.golden, evidence.cloud, evidence.on_clients
    built = candidate.build(material)
    session = open_session(built.onnx, threads=material.run.serving.threads)
    with torch.inference_mode():
        expected = built.reference(torch.from_numpy(golden)).float().numpy()
    outputs = answer(session, golden)
    if built.exact:
        _parity_gate(candidate.name, expected, outputs)
    elif not np.isfinite(outputs).all():
        raise CompressionError("its outputs for the golden inputs are not finite")
    built, undecoded = _decodable(built, material.task, golden, outputs)
    heldout, targets, metric = None, None, math.nan
    if cloud is not None:
        heldout, targets = answers(session, cloud.heldout)
        primary = material.task.primary
        measured = measure_outputs([primary], torch.from_numpy(heldout), targets)
        metric, why = measured.judged(primary)
        if why:
            raise CompressionError(
                f"its {primary.name} on the cloud's held-out data is undefined ({why})"
            )
    return Evaluated(
        built=built,
        golden=outputs,
        max_abs_error=max_abs_error(expected, outputs),
        heldout=heldout,
        targets=targets,
        metric=metric,
        clients=on_clients(built.onnx) if on_clients and cloud is not None else None,
        undecoded=undecoded,
    )


def _decodable(
    built: Built, task: Task, golden: NDArray[Any], outputs: FloatArray
) -> tuple[Built, str]:
    """Adds a decode graph to the file of a next-token model; returns why not where it cannot."""
    if task.problem.presentation != "tokens" or golden.ndim != 2 or golden.dtype.kind not in "iu":
        return built, ""
    allowed = tolerance(outputs, relative=EXACT if built.exact else QUANTISED)
    try:
        onnx = with_decode_graph(built.onnx, golden, outputs, allowed=allowed)
    except NotDecodable as error:
        return built, str(error)
    return replace(built, onnx=onnx), ""


def _parity_gate(name: str, expected: FloatArray, outputs: FloatArray) -> None:
    for who, answers_ in (("torch", expected), ("the exported file", outputs)):
        if not np.isfinite(answers_).all():
            raise ParityError(
                f"candidate {name}: {who} returns NaN or infinity for some golden inputs. "
                "Nothing was released; check the model for divisions, logarithms or powers that "
                "inputs within the range of the cloud's data can overflow."
            )
    error, allowed = max_abs_error(expected, outputs), tolerance(expected, relative=EXACT)
    if error > allowed:
        raise ParityError(
            f"candidate {name}: the exported file's outputs for the golden inputs differ from "
            f"torch's by up to {error:.3g}, but at most {allowed:.3g} is allowed. Nothing was "
            "released; check the model for operations that ONNX rounds or orders differently, "
            "that behave differently during export, or whose answer to one input depends on the "
            "others of its batch (use GroupNorm, or BatchNorm with running statistics)."
        )


def _without_fp32(error: FedcoreError) -> FedcoreError:
    if isinstance(error, TaskError):
        return error
    return CompressionError(
        f"candidate fp32: {error}, and the others are compared with it. Nothing was released; "
        "look for inputs that are not finite, for operations that onnxruntime does not support, "
        "or for too few held-out data: the metric needs targets that count (not all of them "
        "ignore_index), of every class that it compares."
    )


def _demand_finite_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CompressionError(
                f"model: {count} of the {counted(tensor.numel(), 'value')} of {name!r} are NaN "
                "or infinite. Nothing was compressed or released; training has diverged: lower "
                "the learning rate and run again."
            )


def _unjudged(run: RunConfig, evaluated: Mapping[str, Evaluated]) -> set[str]:
    """Returns the candidates that learnt from the cloud's data without the clients who judge."""
    if not clients_judge(run):
        return set()
    return {
        name for name, each in evaluated.items() if each.built.retrained and each.clients is None
    }


def _notes(
    cloud: CloudData | None, chosen: str, released: Evaluated, slower: str, *, reduce_range: bool
) -> tuple[str, ...]:
    notes = []
    if released.undecoded:
        notes.append(
            "Devices run the whole window for each token that they generate, as the model has no "
            f"decode graph: {released.undecoded}."
        )
    if cloud is None:
        notes.append(
            "The cloud has no held-out data to evaluate candidates on, so the model was exported "
            "without compression."
        )
        return tuple(notes)
    if slower:
        notes.append(f"Candidate {chosen} was chosen, {slower}.")
    if released.built.in_8_bits and reduce_range:
        notes.append(
            "int8 weights were kept to 7 bits (compression.reduce_range), so that processors "
            "without 8-bit dot products give the same outputs."
        )
    elif released.built.in_8_bits:
        notes.append(
            "int8 weights use all 8 bits. An x86 device without VNNI or AMX may give different "
            "outputs; its self-test then refuses the model (compression.reduce_range = true makes "
            "one for such devices)."
        )
    return tuple(notes)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
