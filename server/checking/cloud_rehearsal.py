"""Steps that run one step of what the cloud does: fine-tune, compress, release, and resume."""

from __future__ import annotations

import copy
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from fedcore.artifacts.manifest import PrivacyStatement
from fedcore.config.run import RunConfig
from fedcore.errors import ParityError, TaskError
from fedcore.files import sha256_hex
from fedcore.observability.words import bytes_text, counted
from fedcore.seeds import kept_streams
from fedcore.task.definition import Examples, size_of
from fedcore.task.model import build_model, checkpoint_bytes, load_checkpoint, preprocess_bytes
from fedcore.updates.pack import pack
from server.checking.looking import DataFault
from server.checking.state import MOST_EXAMPLES, CheckState, Fault, StepOutcome, few
from server.cloud import CloudData
from server.compression.compress import EXACT, compress
from server.compression.draft import draft_of
from server.compression.evaluated import NOT_NEEDED
from server.compression.golden import tolerance
from server.compression.runtime import answer, open_session
from server.finetune.loop import train_start
from server.finetune.parallel import device_of
from server.finetune.rehearse import rehearse
from server.release.draft import Origin
from server.release.publish import check_publishable, initialise, publish
from server.release.push import check_push
from server.rounds.checkpointing.progress import Progress
from server.rounds.strategies.flower import choose_strategy
from server.rounds.strategies.state import strategy_state_of
from server.simulation.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from server.simulation.virtual.state import SimulationState

_PROCESSES = 2


def fine_tune_here(state: CheckState) -> StepOutcome:
    """Trains the model for an epoch on some of the cloud's data, in this process."""
    if state.cloud is None or not state.run.finetune.epochs:
        return StepOutcome("not used" if state.place != "device" else "not checked on a device")
    run = _epochs(state.run, 1)
    examples = few(state.cloud, run.finetune.batch_size, outputs=state.output_shape)
    model = copy.deepcopy(state.model)
    with kept_streams():
        device = device_of(0)
        remember = run.finetune.remember
        train_start(model.to(device), state.task, examples, run, device, remember=remember)
    return StepOutcome(f"one epoch on {counted(size_of(examples), 'example')}, in this process")


def _epochs(run: RunConfig, epochs: int) -> RunConfig:
    finetune = run.finetune.model_copy(update={"epochs": epochs})
    return run.model_copy(update={"finetune": finetune})


def fine_tune_distributed(state: CheckState) -> StepOutcome:
    """Trains with DDP in two forked processes, on shards of unequal use as in a run."""
    if state.cloud is None or not state.run.finetune.epochs:
        return StepOutcome("not used" if state.place != "device" else "not checked on a device")
    run = _epochs(state.run, 2)  # DDP finds weights without a gradient at its second step
    examples = few(state.cloud, run.finetune.batch_size, outputs=state.output_shape)
    rehearse(state.task, run, copy.deepcopy(state.model), examples, processes=_PROCESSES)
    count = counted(size_of(examples), "example")
    return StepOutcome(f"two epochs on {count} by DDP in {_PROCESSES} processes")


def build_candidates(state: CheckState) -> StepOutcome:
    """Builds every candidate from a few examples, and compares outputs with torch's."""
    inputs, _ = state.sample_batch()
    run, task = _compression_of(state.run), state.task
    cloud = None
    if state.cloud is not None and state.cloud_heldout is not None:
        train, heldout = (_first(state, each) for each in (state.cloud, state.cloud_heldout))
        cloud = CloudData(train, heldout)
    model = copy.deepcopy(state.model).cpu().eval()
    with kept_streams():
        made = compress(run, task, model, cloud, progress=lambda text: None)
    expected = state.outputs(inputs).float().numpy()
    found = answer(open_session(made.files["fp32"], threads=1), inputs.numpy())
    error = float(np.abs(found - expected).max(initial=0.0))
    allowed = tolerance(expected, relative=EXACT)
    if not error <= allowed:  # also true for NaN
        raise ParityError(
            f"on real inputs the exported model differs from torch's by {error:.3g}, and at most "
            f"{allowed:.3g} is allowed: look for operations that ONNX rounds or orders otherwise, "
            "and for outputs that are not finite."
        )
    text = f"ONNX of {len(made.files['fp32']):,} bytes; largest difference from torch {error:.2g}"
    others = [name for name in made.files if name != "fp32"]
    if others:
        text += f"; {', '.join(others)} can be built"
    faults = [
        Fault(None, DataFault("candidate", None, f"{record.name}: {record.reason}", required=False))
        for record in made.records
        if record.name not in made.files and not record.reason.startswith(NOT_NEEDED)
    ]
    state.compressed = made
    return StepOutcome(text, faults)


def _first(state: CheckState, examples: Examples) -> Examples:
    return few(examples, MOST_EXAMPLES, outputs=state.output_shape)


def _compression_of(run: RunConfig) -> RunConfig:
    """Returns the run without limits, which an untrained model on few examples may miss."""
    unlimited = {
        "max_accuracy_drop": 1e9,
        "min_agreement": 0.0,
        "max_bytes": None,
        "max_p50_us": None,
    }
    few_epochs = {
        "prune_epochs": min(run.compression.prune_epochs, 1),
        "rounding_epochs": 1,
        "distil_epochs": 1,
    }
    short = {**few_epochs, "timing_runs": 100}
    compression = run.compression.model_copy(update={**unlimited, **short})
    return run.model_copy(update={"compression": compression})


def try_release(state: CheckState) -> StepOutcome:
    """Publishes what was built into a temporary repository with keys of its own."""
    made = state.compressed
    assert made is not None, "an earlier step builds it"
    parent = sha256_hex(checkpoint_bytes(state.model))
    statement = PrivacyStatement(unit="none", epsilon=None, target_delta=None, noise="none")
    origin = Origin(
        run=state.run.name,
        round=1,
        parent_sha256=parent,
        config_sha256=sha256_hex(b""),
        seed=state.run.seed,
        privacy=statement,
    )
    now = datetime.now(UTC)
    release = state.run.release
    if release.repository is not None and release.keys is not None:
        real, real_keys = state.run.path(release.repository), state.run.path(release.keys)
        check_publishable(state.run.model_name, repository=real, keys=real_keys, now=now)
        if release.push is not None:
            check_push(real, real_keys, release.push)
    with tempfile.TemporaryDirectory(prefix="fedcore-check-") as folder:
        repository, keys = Path(folder) / "releases", Path(folder) / "keys"
        initialise(repository, keys, now=now)
        draft = draft_of(state.run.model_name, state.task, origin, made, None)
        publish(draft, repository=repository, keys=keys, created=now)
    size = len(draft.onnx) + len(draft.golden)
    return StepOutcome(
        f"{bytes_text(size)} for each device, {bytes_text(len(draft.golden))} golden"
    )


def try_resume(state: CheckState) -> StepOutcome:
    """Writes a checkpoint of the model and the strategy, and reads it again."""
    weights = pack(state.model.model)
    cohort = state.run.federation.cohort or max(len(state.names), 1)
    chosen = choose_strategy(state.run, None, cohort=cohort, size=len(weights))
    progress = Progress(
        round=1,
        over=False,
        weights=weights,
        best=weights,
        best_round=1,
        most_failed=0,
        strategy=strategy_state_of(chosen.strategy),
        preprocess=preprocess_bytes(state.model),
    )
    with tempfile.TemporaryDirectory(prefix="fedcore-check-") as folder:
        path = Path(folder) / "checkpoint"
        write_checkpoint(path, Checkpoint({}, progress, (), SimulationState(), 0.0))
        back, size = read_checkpoint(path).progress, path.stat().st_size
    same = np.array_equal(back.weights, weights) and back.preprocess == progress.preprocess
    raw, twin = checkpoint_bytes(state.model), build_model(state.task, state.run)
    load_checkpoint(raw, twin, where="a checkpoint of the check")
    inputs, _ = state.sample_batch()
    with torch.inference_mode():
        same = same and torch.allclose(
            twin.eval()(inputs), state.outputs(inputs), rtol=1e-4, atol=1e-6, equal_nan=True
        )
    if not same:
        raise TaskError(
            "a model that was saved and loaded gives other outputs: it keeps state that neither "
            "parameters nor buffers hold. Keep it in a buffer (register_buffer)."
        )
    return StepOutcome(f"a checkpoint of {bytes_text(size)} was written and read")
