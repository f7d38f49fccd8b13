"""From steps of the subsampled Gaussian mechanism to epsilon, and back to the noise it takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant, create_accountant
from opacus.accountants.analysis import rdp
from opacus.accountants.utils import get_noise_multiplier

from fedcore.errors import PrivacyError

Accountant = Literal["rdp", "prv"]


@dataclass(frozen=True)
class Charge:
    """What one local training run spends: some steps of DP-SGD with Poisson sampling."""

    round: int
    noise_multiplier: float
    sample_rate: float
    """The probability with which each example is in a step's batch."""
    steps: int

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and 0 < self.sample_rate <= 1 and self.steps >= 0):
            raise ValueError(f"{self}: this is no step of DP-SGD")


def epsilon_of(charges: Sequence[Charge], *, target_delta: float, accountant: Accountant) -> float:
    """The epsilon of all charges together, at ``target_delta``.

    Guarantee:
        An upper bound on the true epsilon under add-or-remove-one adjacency of examples, composed
        over all charges. Order does not matter.

    Source:
        Mironov, Talwar, Zhang 2019, arXiv:1908.10530 (RDP); Gopi, Lee, Wutschitz 2021,
        arXiv:2106.02848 (PRV).
    """
    steps: dict[tuple[float, float], int] = {}
    for charge in charges:
        mechanism = (charge.noise_multiplier, charge.sample_rate)
        steps[mechanism] = steps.get(mechanism, 0) + charge.steps
    history = tuple((*mechanism, count) for mechanism, count in sorted(steps.items()) if count)
    return _epsilon(history, target_delta, accountant) if history else 0.0


@lru_cache(maxsize=4096)
def _epsilon(
    history: tuple[tuple[float, float, int], ...], target_delta: float, accountant: Accountant
) -> float:
    with _expected():
        if accountant == "rdp":
            orders = RDPAccountant.DEFAULT_ALPHAS
            spent = sum(_curve(noise, rate) * steps for noise, rate, steps in history)
            return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=target_delta)[0])
        engine = create_accountant(accountant)
        engine.history = list(history)
        return float(engine.get_epsilon(delta=target_delta))


@lru_cache(maxsize=4096)
def _curve(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """What one step costs at each of Opacus' orders: steps add up, so it is computed once."""
    return np.asarray(
        rdp.compute_rdp(
            q=sample_rate,
            noise_multiplier=noise_multiplier,
            steps=1,
            orders=RDPAccountant.DEFAULT_ALPHAS,
        )
    )


@contextmanager
def _expected() -> Iterator[None]:
    """Silences what Opacus says of bounds that hold.

    RDP warns when its best order is at the edge of its table; PRV takes the logarithm of 0 where
    every example is in every step.
    """
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore", UserWarning)
        yield


@lru_cache(maxsize=4096)
def noise_for(
    *,
    max_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant,
) -> float:
    """The least noise multiplier that keeps ``steps`` steps within ``max_epsilon``.

    Raises:
        PrivacyError: no noise is enough at that delta.
    """
    try:
        with _expected():
            noise = get_noise_multiplier(
                target_epsilon=max_epsilon,
                target_delta=target_delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=accountant,
                epsilon_tolerance=min(0.01, 0.002 * max_epsilon),
            )
    except ValueError as error:
        raise PrivacyError(
            f"privacy.max_epsilon = {max_epsilon} at target_delta = {target_delta} cannot be kept "
            f"over {steps} steps at sample rate {sample_rate:.3g}, however much noise: {error} "
            "Nothing was trained; allow more epsilon, or set privacy.accountant to 'prv', which "
            "reaches lower."
        ) from None
    # Rounded up, so that the figure can be printed and typed back without spending more.
    return float(math.ceil(noise * 1e4) / 1e4)
