"""Chooses how to compute a step of fine-tuning, by trying for a bounded time.

In: a run whose task is in a file, and a starting point. Out: an `AutoChoice`, with all trials.
Start with `choose`. The order of trials is fixed: each changes one setting of the fastest way so
far.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import DataError, TrainingError
from fedcore.files import read_if_exists, sha256_hex, write_json
from fedcore.observability.foreign import foreign
from fedcore.observability.words import NOTHING, bytes_text, figure, seconds_text
from fedcore.task.definition import size_of
from fedcore.task.model import FullModel, checkpoint_bytes
from server.cloud import CloudData
from server.finetune.timing import Timed, timing_processes
from server.process.cores import usable_cores
from server.report.trials import settings_text

AUTO_FILE = "finetune_auto.json"
"""Keeps the choice in a run's folder, so that a resumed run computes in the same way."""
_GAIN = 1.05
"""How much faster a way must be to be chosen: less is within the noise of a short trial."""
_WINDOW_S = 1.5
_TRIED_PARTS = (2, 4)
_SAVING_PARTS = (2, 4, 8, 16)
_PREFETCHED = 2
_MAX_BYTES = 1 << 20
_WHAT = "a choice of finetune.auto"

Settings = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One way to compute, and what trying it showed."""

    settings: Settings
    """What differs from the run's own settings; empty for those themselves."""
    examples_per_s: float | None
    """None where it was not measured."""
    peak_bytes: int | None
    seconds: float
    """How long the trial took, with the start of processes."""
    problem: str = ""
    """Why this way cannot be chosen; empty where it can."""


@dataclass(frozen=True)
class AutoChoice:
    """What was tried, and what was chosen."""

    settings: Settings
    """Settings of ``[finetune]`` to train with in place of the run's; empty to keep them."""
    trials: tuple[Trial, ...]

    def applied(self, run: RunConfig) -> RunConfig:
        """Returns the run with the chosen settings."""
        finetune = run.finetune.model_copy(update=self.settings)
        return run.model_copy(update={"finetune": finetune})

    def __str__(self) -> str:
        first, best = self.trials[0], self._chosen
        seconds = sum(trial.seconds for trial in self.trials)
        tried = f"{len(self.trials)} ways in {seconds_text(seconds)}"
        if not self.settings:
            return f"finetune.auto tried {tried}, and kept the settings as they are"
        rate, before = best.examples_per_s, first.examples_per_s
        gain = f", {rate / before:.2f} times as many as before" if rate and before else ""
        return (
            f"finetune.auto tried {tried}, and chose {settings_text(self.settings)}: "
            f"{figure(rate, 3)} examples/s{gain}"
        )

    @property
    def _chosen(self) -> Trial:
        return next(trial for trial in self.trials if trial.settings == self.settings)

    def table(self) -> str:
        """Returns all trials as lines of text; the chosen one is marked."""
        lines = [("", "settings", "examples/s", "memory", "trial", "")]
        for trial in self.trials:
            lines.append(
                (
                    "*" if trial.settings == self.settings else "",
                    settings_text(trial.settings),
                    figure(trial.examples_per_s, 4),
                    NOTHING if trial.peak_bytes is None else bytes_text(trial.peak_bytes),
                    seconds_text(trial.seconds),
                    trial.problem,
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


class _Clock(Protocol):
    def time(self, settings: Finetune, *, window_s: float, limit_s: float) -> Timed: ...


def choose(
    run: RunConfig,
    model: FullModel,
    cloud: CloudData,
    *,
    kept: Path | None,
    note: Callable[[str], None],
) -> AutoChoice:
    """Returns the fastest way to compute a step that ``finetune.auto_s`` suffices to find.

    Args:
        run: The run; its task is in a file.
        model: What training starts from. Not changed.
        cloud: The cloud's data.
        kept: File that keeps the choice: one for the same settings and data is returned without a
            trial. None for none.
        note: Callback with each trial, in words.

    Raises:
        DataError: ``kept`` is damaged.
    """
    identity = _identity(run, cloud)
    if kept is not None and (found := _read(kept, identity)) is not None:
        return found
    mixes = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())
    with timing_processes(run, checkpoint_bytes(model)) as processes:
        found = search(
            run.finetune, processes, processes_to_try=_processes(), mixes=mixes, note=note
        )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"identity": identity, **asdict(found)})
    return found


def _processes() -> list[int]:
    """Returns numbers of processes to try: up to one for each GPU, or else for each core."""
    most = torch.cuda.device_count() if torch.cuda.is_available() else usable_cores()
    return [2**power for power in range(1, 11) if 2**power <= most]


def search(
    settings: Finetune,
    processes: _Clock,
    *,
    processes_to_try: list[int],
    mixes: bool,
    note: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> AutoChoice:
    """Tries ways one after the other, until all are tried or ``auto_s`` has passed.

    Args:
        settings: The settings of the run.
        processes: What times them.
        processes_to_try: Numbers of processes.
        mixes: Whether a layer mixes the examples that are computed together (batch normalisation),
            so that dividing a batch would train another model.
        note: Callback with each trial, in words.
        clock: Returns seconds.
    """
    end_s, trials = clock() + settings.auto_s, list[Trial]()

    def attempt(changed: Settings) -> Trial:
        began_s = clock()
        tried = settings.model_copy(update=changed)
        try:
            timed = processes.time(tried, window_s=_WINDOW_S, limit_s=max(1.0, end_s - began_s))
        except TrainingError as error:
            reason = foreign(error, 200)
            trial = Trial(changed, None, None, clock() - began_s, reason)
        else:
            problem = "" if timed.fits else "needs more memory than is free"
            rate = timed.examples_per_s
            trial = Trial(changed, rate, timed.peak_bytes, clock() - began_s, problem)
        trials.append(trial)
        rate_text = f"{figure(trial.examples_per_s, 4)} examples/s"
        note(f"{settings_text(changed)}: {trial.problem or rate_text}")
        return trial

    best = attempt({})
    for changed in _saving(settings, mixes=mixes) if best.problem else ():
        if clock() >= end_s:
            break
        trial = attempt(changed)
        if not trial.problem:
            best = trial
            break
    for name, values in _ways(settings, processes_to_try, mixes=mixes):
        for value in values:
            if clock() >= end_s or best.problem:
                break
            trial = attempt({**best.settings, name: value})
            if not trial.problem and _faster(trial, best):
                best = trial
    return AutoChoice({} if best.problem else best.settings, tuple(trials))


def _faster(trial: Trial, best: Trial) -> bool:
    assert trial.examples_per_s is not None
    assert best.examples_per_s is not None
    return trial.examples_per_s > _GAIN * best.examples_per_s


def _saving(settings: Finetune, *, mixes: bool) -> Iterator[Settings]:
    """Yields ways that need less memory than the given one, the fastest first."""
    given = settings.model_fields_set
    checkpointed: Settings = {}
    if "activation_checkpointing" not in given and not settings.activation_checkpointing:
        checkpointed = {"activation_checkpointing": True}
        yield checkpointed
    if "accumulate_steps" not in given and not mixes:
        for parts in _SAVING_PARTS:
            if parts * settings.processes <= settings.batch_size:
                yield {**checkpointed, "accumulate_steps": parts}


def _ways(
    settings: Finetune, processes: list[int], *, mixes: bool
) -> Iterator[tuple[str, list[Any]]]:
    """Yields settings that the run leaves open, with the values to try."""
    given, batch = settings.model_fields_set, settings.batch_size
    whole = [each for each in processes if batch % each == 0 and each != settings.processes]
    open_: dict[str, list[Any]] = {
        "processes": [] if mixes or settings.nodes > 1 else whole,
        "accumulate_steps": [] if mixes else [each for each in _TRIED_PARTS if each <= batch],
        "prefetch": [_PREFETCHED],
        "fused": [True],
        "precision": ["bf16"] if settings.auto_precision and settings.shard != "always" else [],
        "compile": [True],
    }
    for name, values in open_.items():
        if name not in given:
            yield name, values


def _identity(run: RunConfig, cloud: CloudData) -> str:
    """Returns a digest of what a choice depends on: settings, task and the size of the data."""
    path = run.path(run.task)
    described = {
        "finetune": run.finetune.model_dump(mode="json"),
        "given": sorted(run.finetune.model_fields_set),
        "task": sha256_hex(path.read_bytes()) if path.is_file() else run.task,
        "examples": size_of(cloud.train),
    }
    return sha256_hex(json.dumps(described, sort_keys=True).encode())


def read_trials(folder: Path) -> dict[str, Any] | None:
    """Returns what the file in a run's folder keeps, as plain values; None if there is no file."""
    raw = read_if_exists(folder / AUTO_FILE, max_bytes=_MAX_BYTES, what=_WHAT)
    if raw is None:
        return None
    kept: dict[str, Any] = json.loads(raw)
    return {name: value for name, value in kept.items() if name != "identity"}


def _read(path: Path, identity: str) -> AutoChoice | None:
    """Returns a choice that was kept; None if there is none for these settings and data."""
    raw = read_if_exists(path, max_bytes=_MAX_BYTES, what=_WHAT)
    if raw is None:
        return None
    try:
        kept = json.loads(raw)
        if kept.pop("identity") != identity:
            return None
        trials = tuple(Trial(**each) for each in kept["trials"])
        found = AutoChoice(kept["settings"], trials)
        Finetune.model_validate(found.settings)  # a damaged file must not train otherwise
        assert found._chosen
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise DataError(
            f"{path}: this file does not keep a choice of finetune.auto: {foreign(error, 200)}. "
            "Nothing was trained; remove it, and the settings are tried again."
        ) from error
    return found
