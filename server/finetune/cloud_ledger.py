"""The cloud's privacy ledger: what each training on the cloud's protected data spends.

In: the plan of a training. Out: a `CloudStatement`. Start with `charged`. The file is JSON, written
whole and durably. A charge is on disk before its training begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.artifacts.manifest import CloudStatement
from fedcore.config.run import RunConfig
from fedcore.errors import BudgetExhausted, DataError, ResourceError
from fedcore.files import lock_file, read_if_exists, write_atomic
from fedcore.observability.faults import first_fault
from fedcore.observability.words import counted, epsilon_text
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.planning import PrivatePlan

_MAX_BYTES = 64 << 20


class _Training(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    run: str
    """Name of the run."""
    identity: str
    """Digest of what determines a training, except its random numbers."""
    noise_multiplier: Annotated[float, Field(gt=0)]
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]
    complete: bool
    """Whether a model may have come out. A training that was interrupted before has released
    nothing, and goes on under its charge."""

    @property
    def charge(self) -> Charge:
        return Charge(0, self.noise_multiplier, self.sample_rate, self.steps)


class _LedgerFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Annotated[int, Field(ge=1, le=1)] = 1
    trainings: tuple[_Training, ...] = ()


@contextmanager
def charged(run: RunConfig, plan: PrivatePlan, *, identity: str) -> Iterator[CloudStatement]:
    """Charges a training before the block, and marks it complete when the block ends without error.

    Guarantee:
        The ledger's epsilon is never below that of all models that came out of such blocks, however
        often processes are killed. No other training that uses the ledger runs meanwhile.

    Args:
        run: ``[finetune.privacy]`` is used.
        plan: The training's noise and steps.
        identity: Digest of what determines the training; one of the same digest that was
            interrupted is not charged again.

    Raises:
        BudgetExhausted: the charge would exceed ``finetune.privacy.max_epsilon``.
        ResourceError: another training uses the ledger, or it cannot be written.
        DataError: the file is damaged.
        DiskFull: the disk has no room.
    """
    path = run.path(run.finetune.privacy.ledger)
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = ResourceError(
        f"{path}: another training uses this ledger. Nothing was trained; wait until it has ended."
    )
    with lock_file(path.with_name(path.name + ".lock"), busy):
        before = _read(path)
        new = _Training(
            run=run.name,
            identity=identity,
            noise_multiplier=plan.charge.noise_multiplier,
            sample_rate=plan.charge.sample_rate,
            steps=plan.charge.steps,
            complete=False,
        )
        trainings = before if new in before else (*before, new)
        statement = _statement(run, plan, before, trainings, path)
        _write(path, trainings)
        yield statement
        index = trainings.index(new)
        done = new.model_copy(update={"complete": True})
        _write(path, (*trainings[:index], done, *trainings[index + 1 :]))


def _statement(
    run: RunConfig,
    plan: PrivatePlan,
    before: tuple[_Training, ...],
    trainings: tuple[_Training, ...],
    path: Path,
) -> CloudStatement:
    privacy, accountant = run.finetune.privacy, run.privacy.accountant

    def epsilon(some: tuple[_Training, ...]) -> float:
        charges = [one.charge for one in some]
        return epsilon_of(charges, target_delta=privacy.target_delta, accountant=accountant)

    spent = epsilon(trainings)
    if spent > privacy.max_epsilon:
        raise BudgetExhausted(
            f"{path}: {counted(len(before), 'training')} on the cloud's data spent epsilon "
            f"{epsilon_text(epsilon(before))}, and one more would make it {epsilon_text(spent)} at "
            f"delta {privacy.target_delta:g}; finetune.privacy.max_epsilon = "
            f"{privacy.max_epsilon:g}. Nothing was trained; use the models that exist, or raise "
            "max_epsilon, and with finetune.privacy.trainings plan for as many as you need."
        )
    return CloudStatement(
        epsilon=spent,
        target_delta=privacy.target_delta,
        noise_multiplier=plan.charge.noise_multiplier,
        clip_norm=plan.clip_norm,
        sample_rate=plan.charge.sample_rate,
        steps=plan.charge.steps,
        trainings=len(trainings),
        accountant=accountant,
    )


def _read(path: Path) -> tuple[_Training, ...]:
    raw = read_if_exists(path, max_bytes=_MAX_BYTES, what="the cloud's privacy ledger")
    if raw is None:
        return ()
    try:
        return _LedgerFile.model_validate_json(raw).trainings
    except ValidationError as error:
        raise DataError(
            f"{path}: this is no privacy ledger: {first_fault(error)}. Nothing was trained; "
            "restore the file. Without it, what was spent on these data is not known."
        ) from None


def _write(path: Path, trainings: tuple[_Training, ...]) -> None:
    raw = _LedgerFile(trainings=trainings).model_dump_json(indent=2)
    write_atomic(path, raw.encode(), mode=0o600)
