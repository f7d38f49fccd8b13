"""The steps after the rounds of a deployment: fine-tuning, compression and release, once each.

`finish` runs them. The result of each step is stored in ``steps/`` until the run is complete. If
the process is killed, ``--resume`` continues with the interrupted step, and never publishes twice.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcore.artifacts.golden import MAX_GOLDEN_BYTES, golden_bytes, parse_golden
from fedcore.artifacts.manifest import (
    MAX_MODEL_BYTES,
    CloudStatement,
    Digest,
    MissingAllowed,
    Parity,
)
from fedcore.config.run import RunConfig
from fedcore.config.section import Section
from fedcore.errors import DataError, ReleaseError
from fedcore.files import read_bytes, read_if_exists, sha256_hex, write_atomic
from fedcore.observability.events import Sink
from fedcore.task.definition import Task, data_folder
from fedcore.task.model import (
    MAX_CHECKPOINT_BYTES,
    FullModel,
    build_model,
    checkpoint_bytes,
    load_checkpoint,
)
from server.after_rounds import FederatedModel, StageFunctions, StageLog, after_rounds
from server.cloud import CloudData
from server.compression.compress import compress
from server.compression.compressed import Compressed
from server.finetune.launch import Finetuned, fine_tune
from server.live.resume import STEPS
from server.preflight import read_for_release
from server.records import CandidateRecord
from server.release.once import PUBLISHED, publish_once
from server.report.folder import write_results
from server.rounds.app import Outcome
from server.rounds.evaluation.judgement import Judgement
from server.rounds.evaluation.judging import Judge, MeasureOnnx

_MAX_BYTES = 16 << 20
_FINETUNE, _COMPRESS = "finetune.json", "compress.json"
_TUNED = ("candidate", "cloud_alone")
_GOLDEN = "golden.safetensors"
_Note = TypeVar("_Note", bound="_StepNote")


class _StepNote(BaseModel):
    """Note on a step, stored as JSON in ``steps/`` after the files that it names."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    made_from: Digest
    """Digest of the step's input model and settings."""


class _FinetuneNote(_StepNote):
    """Note on fine-tuning, see `Finetuned`."""

    kept: bool
    before: float
    after: float
    clients: Judgement | None
    unjudged: str
    files: dict[str, Digest]
    privacy: CloudStatement | None = None


class _CompressNote(_StepNote):
    """Note on compression, see `Compressed`."""

    records: tuple[CandidateRecord, ...]
    chosen: str
    torch_p50_us: float
    parity: Parity
    golden: Digest
    golden_tolerance: float
    calibration: str
    missing: MissingAllowed | None = None
    notes: tuple[str, ...]


def check_finish(run: RunConfig, task: Task) -> CloudData | None:
    """Checks the inputs of the steps after the rounds, before any device is sent work.

    Returns the cloud's data, which it reads for the check; None if the task has none.

    Raises:
        ReleaseError: the model could not be published.
        FedcoreError: the cloud's data or the test split cannot be used.
    """
    cloud, _ = read_for_release(run, task, data_folder())
    return cloud


def finish(
    run: RunConfig,
    task: Task,
    outcome: Outcome,
    folder: Path,
    emit: Sink,
    *,
    judge: Judge | None = None,
) -> None:
    """Runs the remaining steps after the rounds, and writes the run's results.

    Args:
        run: The run's configuration, which names a repository.
        task: The run's task.
        outcome: The result of the rounds.
        folder: The run's folder.
        emit: Callback with each event.
        judge: Evaluates the fine-tuned model on devices; None to evaluate on the cloud's data.

    Raises:
        ReleaseError: the run is complete, and its model was withheld from release; or publishing it
            failed, and the run can be resumed.
        FedcoreError: a step failed; anything published before stays published.
        KeyboardInterrupt: SIGTERM or SIGINT; completed steps stay completed.
    """
    started = time.monotonic()
    cloud, test = read_for_release(run, task, data_folder())
    steps = folder / STEPS
    story = StageLog(emit)
    story.seconds["federate"] = sum(each.seconds for each in outcome.federated.rounds)
    trained = FederatedModel(
        outcome,
        clients=(),
        training=None,
        device="devices",
        noise="none" if run.privacy.unit == "none" else "system",
        judge=judge,
    )
    finished = after_rounds(
        run,
        task,
        cloud,
        test,
        trained,
        folder,
        story,
        steps=StageFunctions(
            partial(_fine_tuned, steps),
            partial(_compressed, steps),
            partial(publish_once, steps / PUBLISHED),
        ),
    )
    taken_s = story.seconds["federate"] + time.monotonic() - started
    delta = run.privacy.target_delta if run.private else None
    write_results(folder, finished, target_delta=delta, seconds=taken_s)
    if finished.record.unreleased:  # the steps stay, for --resume
        raise ReleaseError(finished.record.unreleased)
    shutil.rmtree(steps, ignore_errors=True)
    if finished.record.withheld:
        raise ReleaseError(finished.record.withheld)


def _fine_tuned(
    folder: Path,
    task: Task,
    run: RunConfig,
    model: FullModel,
    cloud: CloudData,
    judge: Judge | None,
    *,
    emit: Sink,
    auto_file: Path,
) -> Finetuned:
    """Returns the result of fine-tuning: the stored one if it is intact, else a new one."""
    origin = _origin(model, run.finetune)
    noted = _noted(folder / _FINETUNE, _FinetuneNote, origin)
    if noted is not None:
        found = {
            name: _model(folder, name, noted.files[name], build_model(task, run))
            for name in _TUNED
            if name in noted.files
        }
        candidate, alone = (found.get(name) for name in _TUNED)
        if candidate is not None and None not in found.values():
            return Finetuned(
                candidate if noted.kept else model,
                candidate,
                alone,
                noted.kept,
                noted.before,
                noted.after,
                noted.clients,
                noted.unjudged,
                privacy=noted.privacy,
                parent_sha256=sha256_hex(checkpoint_bytes(model)),
            )
    tuned = fine_tune(task, run, model, cloud, judge, emit=emit, auto_file=auto_file)
    files = {}
    for name, one in zip(_TUNED, (tuned.candidate, tuned.cloud_alone), strict=True):
        if one is not None:
            raw = checkpoint_bytes(one)
            write_atomic(_checkpoint(folder, name), raw)
            files[name] = sha256_hex(raw)
    note = _FinetuneNote(
        made_from=origin,
        kept=tuned.kept,
        before=tuned.before,
        after=tuned.after,
        clients=tuned.clients,
        unjudged=tuned.unjudged,
        files=files,
        privacy=tuned.privacy,
    )
    _write(folder / _FINETUNE, note)
    return tuned


def _compressed(
    folder: Path,
    run: RunConfig,
    task: Task,
    model: FullModel,
    cloud: CloudData | None,
    *,
    progress: Callable[[str], None],
    on_clients: MeasureOnnx | None,
    tuning_kept: bool,
) -> Compressed:
    """Returns the result of compression: the stored one if it is intact, else a new one.

    Reusing the stored one matters, as latencies that decide between candidates vary from one
    measurement to the next.
    """
    origin = _origin(model, run.finetune, run.compression, run.serving)
    noted = _noted(folder / _COMPRESS, _CompressNote, origin)
    source = sha256_hex(checkpoint_bytes(model))
    primary = task.primary.name
    done = _read_compressed(folder, noted, source, primary) if noted is not None else None
    if done is not None:
        return done
    done = compress(
        run, task, model, cloud, progress=progress, on_clients=on_clients, tuning_kept=tuning_kept
    )
    stored = done.golden
    golden = golden_bytes(stored.inputs, stored.outputs, stored.places, stored.reference)
    write_atomic(folder / _GOLDEN, golden)
    for name, onnx in done.files.items():
        write_atomic(_onnx(folder, name), onnx)
    note = _CompressNote(
        made_from=origin,
        records=done.records,
        chosen=done.chosen,
        torch_p50_us=done.torch_p50_us,
        parity=done.parity,
        golden=sha256_hex(golden),
        golden_tolerance=done.golden_tolerance,
        calibration=done.calibration,
        missing=done.missing,
        notes=done.notes,
    )
    _write(folder / _COMPRESS, note)
    return done


def _read_compressed(
    folder: Path, noted: _CompressNote, source: str, primary: str
) -> Compressed | None:
    """Loads the stored result of compression; returns None if one of its files is damaged."""
    golden = _whole(folder / _GOLDEN, noted.golden, MAX_GOLDEN_BYTES)
    built = [one for one in noted.records if one.sha256]
    files = {
        one.name: _whole(_onnx(folder, one.name), one.sha256, MAX_MODEL_BYTES) for one in built
    }
    if golden is None or None in files.values():
        return None
    return Compressed(
        records=noted.records,
        chosen=noted.chosen,
        files={name: raw for name, raw in files.items() if raw is not None},
        torch_p50_us=noted.torch_p50_us,
        parity=noted.parity,
        golden=parse_golden(golden),
        golden_tolerance=noted.golden_tolerance,
        calibration=noted.calibration,
        missing=noted.missing,
        primary=primary,
        notes=noted.notes,
        source_sha256=source,
    )


def _write(path: Path, note: _StepNote) -> None:
    write_atomic(path, note.model_dump_json(indent=1).encode() + b"\n")


def _origin(model: FullModel, *settings: Section) -> str:
    """Returns the digest of a step's input model and settings.

    Other settings either do not affect the step, or cannot change when a run is resumed.
    """
    parts = [sha256_hex(checkpoint_bytes(model)), *(one.model_dump_json() for one in settings)]
    return sha256_hex("\n".join(parts).encode())


def _noted(path: Path, kind: type[_Note], origin: str) -> _Note | None:
    """Reads the note of a completed step; returns None if there is none for this ``origin``."""
    raw = read_if_exists(path, max_bytes=_MAX_BYTES, what="a note of a step")
    if raw is None:
        return None
    try:
        note = kind.model_validate(json.loads(raw))  # pydantic's own JSON parser rejects NaN
    except (ValidationError, ValueError):
        return None
    return note if note.made_from == origin else None


def _whole(path: Path, digest: str, max_bytes: int) -> bytes | None:
    """Returns a file's bytes; None if it cannot be read or does not match ``digest``."""
    try:
        raw = read_bytes(path, max_bytes=max_bytes, what="a file of a step")
    except DataError:
        return None
    return raw if sha256_hex(raw) == digest else None


def _model(folder: Path, name: str, digest: str, model: FullModel) -> FullModel | None:
    path = _checkpoint(folder, name)
    raw = _whole(path, digest, MAX_CHECKPOINT_BYTES)
    if raw is None:
        return None
    load_checkpoint(raw, model.eval(), where=str(path))
    return model


def _checkpoint(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _onnx(folder: Path, name: str) -> Path:
    return folder / f"{name}.onnx"
