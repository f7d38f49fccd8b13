"""How tight the privacy audit is on sound training, and how surely it catches training that is not.

``python -m benchmarks.privacy_audit`` writes ``runs/bench/privacy_audit.json``. Faults are injected
from outside: the real training function gets a wrong plan or wrong random numbers, while the audit
believes the statement. The physical limit beside each bound is the stated epsilon itself: no valid
lower bound passes it. One core is used; a single process takes some ten minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.figures import Check, Row, row
from benchmarks.measure import processor
from fedcore.files import write_json
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import Draws
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import Randomness, Simulated
from server.privacy.audit import USUAL_EFFORT, Audited, Effort, Statement, audit
from server.privacy.canaries import Train, private_training
from server.privacy.inversion import invert_digits

_SEEDS, _RUNS, _CAUGHT, _FALSE_ALARMS = 5, 20, 19, 1
_LEAST_PSNR_DB = 30.0  # what a person takes for the same picture
ONE_STEP = Statement("one step", PrivatePlan(Charge(1, 1.0, 1.0, 1), 1.0), target_delta=1e-5)
SAMPLED = Statement("sampled", PrivatePlan(Charge(1, 1.0, 0.25, 4), 1.0), target_delta=1e-5)


@dataclass(frozen=True)
class WrongDraws:
    """Draws whose noise is a fraction of what it was asked to be."""

    right: Draws
    share: float

    def seed(self) -> int:
        """The right seed."""
        return self.right.seed()

    def poisson(self, count: int, rate: float) -> Tensor:
        """A right Poisson sample."""
        return self.right.poisson(count, rate)

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        """Too little noise, or none."""
        if self.share:
            self.right.add_noise(sums, deviation=deviation * self.share, bound=bound)


@dataclass(frozen=True)
class WrongRandomness:
    """Randomness whose draws are `WrongDraws`."""

    right: Randomness
    share: float
    origin: Literal["simulated"] = "simulated"

    def generator(self, device: torch.device, *words: str | int) -> torch.Generator:
        """The right generator."""
        return self.right.generator(device, *words)

    def draws(self, device: torch.device, *words: str | int) -> Draws:
        """Draws with too little noise."""
        return WrongDraws(self.right.draws(device, *words), self.share)

    def library_streams(self, *words: str | int) -> AbstractContextManager[None]:
        """The right streams."""
        return self.right.library_streams(*words)


def _less_noise(share: float) -> Callable[[PrivatePlan, Randomness], Train]:
    return lambda plan, randomness: private_training(plan, WrongRandomness(randomness, share))


def _triple_clip(plan: PrivatePlan, randomness: Randomness) -> Train:
    """Clips at three times the norm, and adds the noise that belongs to the right one."""
    charge = plan.charge
    noise = Charge(charge.round, charge.noise_multiplier / 3, charge.sample_rate, charge.steps)
    return private_training(PrivatePlan(noise, 3 * plan.clip_norm), randomness)


FAULTS: dict[str, Callable[[PrivatePlan, Randomness], Train]] = {
    "noise off": _less_noise(0.0),
    "half noise": _less_noise(0.5),
    # Divided by the batch once before it is added, and once more together with the sum.
    "noise on the mean": _less_noise(1 / USUAL_EFFORT.canaries),
    "triple clip": _triple_clip,
}


def audit_once(
    make: Callable[[PrivatePlan, Randomness], Train],
    statement: Statement,
    number: int,
    effort: Effort = USUAL_EFFORT,
) -> Audited:
    """One audit of one seed, all of it fixed by its number."""
    train = make(statement.plan, Simulated(number))
    return audit(train, statement, seeds=[number], effort=effort)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; 1 when a check does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.privacy_audit")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of results")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    checks: list[Check] = []
    for statement in (ONE_STEP, SAMPLED):
        _tightness(statement, rows, checks)
    _power(rows, checks)
    _inversion(rows, checks)
    result = {
        "machine": _machine(),
        "rows": [asdict(one) for one in rows],
        "checks": [asdict(one) for one in checks],
    }
    write_json(options.out / "privacy_audit.json", result)
    print(table(rows, checks))
    return 0 if all(one.holds for one in checks) else 1


def _tightness(statement: Statement, rows: list[Row], checks: list[Check]) -> None:
    """Five seeds at a joint confidence, as the command runs them."""
    train = private_training(statement.plan, Simulated(0))
    found = audit(train, statement, seeds=range(1, _SEEDS + 1))
    audited = [seed.epsilon for seed in found.seeds]
    rows += [
        _row(statement.name, "stated_epsilon", [found.stated]),
        _row(statement.name, "audited_epsilon", audited),
        _row(statement.name, "repeated_epsilon", [seed.repeated for seed in found.seeds]),
        _row(statement.name, "one_run_epsilon", [seed.one_run for seed in found.seeds]),
    ]
    over = [value / found.stated for value in audited]
    checks.append(
        _check(f"{statement.name}: audited over stated", max(over), 1.0, over, at_most=True)
    )
    if statement is ONE_STEP:
        under = [found.stated / max(value, 1e-9) for value in audited]
        checks.append(
            _check(f"{statement.name}: stated over audited", max(under), 1.5, under, at_most=True)
        )


def _power(rows: list[Row], checks: list[Check]) -> None:
    """Twenty audits of one seed each, of sound training and of each fault."""
    for name, make in {"sound": private_training, **FAULTS}.items():
        runs = [audit_once(make, ONE_STEP, number) for number in range(1, _RUNS + 1)]
        caught = float(sum(run.refuted for run in runs))
        rows.append(_row(name, "audited_epsilon", [run.epsilon for run in runs]))
        bound = _FALSE_ALARMS if name == "sound" else _CAUGHT
        checks.append(
            _check(f"{name}: refuted of {_RUNS}", caught, bound, [caught], at_most=name == "sound")
        )


def _inversion(rows: list[Row], checks: list[Check]) -> None:
    plan = ONE_STEP.plan
    found = [
        picture.psnr_db()
        for picture in invert_digits(
            plan.charge.noise_multiplier, plan.clip_norm, Simulated(0), pictures=5, seed=1
        )
    ]
    for guess in ("without", "private", "blind"):
        rows.append(_row("inversion", f"{guess}_psnr", [one[guess] for one in found], "dB"))
    plain = [one["without"] for one in found]
    checks.append(
        _check("inversion without privacy, dB", min(plain), _LEAST_PSNR_DB, plain, at_most=False)
    )
    gained = [one["private"] - one["blind"] for one in found]
    checks.append(
        _check(
            "inversion with privacy over a blind guess, dB", max(gained), 0.0, gained, at_most=True
        )
    )


def _row(workload: str, metric: str, values: Sequence[float], unit: str = "epsilon") -> Row:
    return row("fedcore", workload, metric, unit, values)


def _check(name: str, value: float, bound: float, over: Sequence[float], *, at_most: bool) -> Check:
    return Check(
        name=name,
        value=value,
        bound=bound,
        holds=value <= bound if at_most else value >= bound,
        min=min(over),
        max=max(over),
    )


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("fedcore", "torch", "opacus")},
        },
    }


def table(rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """The result as text."""
    lines = [f"{'workload':18} {'metric':18} {'median':>9} {'min':>9} {'max':>9}  n"]
    lines += [
        f"{one.workload:18} {one.metric:18} {one.median:9.4g} {one.min:9.4g} {one.max:9.4g}  "
        f"{one.repeats}  {one.unit}"
        for one in rows
    ]
    lines += [
        f"{'holds ' if one.holds else 'BROKEN'} {one.name}: {one.value:.4g} "
        f"({one.min:.4g} to {one.max:.4g}), bound {one.bound:.4g}"
        for one in checks
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
