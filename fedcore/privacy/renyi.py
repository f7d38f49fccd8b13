"""Renyi divergences of the Poisson-subsampled Gaussian mechanism, and epsilon from them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

FloatArray = NDArray[np.float64]

ORDERS = (
    *(order / 10 for order in range(20, 110)),
    *range(11, 65),
    *(72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024),
)
"""Orders over which Renyi accounting minimises epsilon."""


def renyi_divergences(
    noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]
) -> FloatArray:
    """Returns one step's cost at each order (2 or more), in the worse direction; costs add up.

    Integer orders have a finite sum. Orders between are bounded by linear interpolation, as the
    logarithm of a moment is convex in the order: the exact series for those does not end in
    reasonable time near a rate of one half, and turns negative at large noise.

    Returns:
        Shape ``(len(orders),)``, each at least 0; infinite beyond float range.

    Source:
        Mironov, Talwar, Zhang 2019, arXiv:1908.10530, sections 3.1 and 3.3.
    """
    alphas = np.asarray(orders, dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        half_ratio = 0.5 / np.square(np.float64(noise_multiplier))
        if sample_rate == 1:
            return np.asarray(alphas * half_ratio)
        whole = sorted({*map(math.floor, orders), *map(math.ceil, orders)})
        logarithms = [_log_moment(order, half_ratio, sample_rate) for order in whole]
        costs = np.interp(alphas, whole, logarithms) / (alphas - 1)
    return np.asarray(np.nan_to_num(costs, nan=np.inf, posinf=np.inf))


def _log_moment(order: int, half_ratio: float, rate: float) -> float:
    """Returns a moment's logarithm as ``log(1 + x)``, which is accurate for tiny ``x``."""
    i = np.arange(2, order + 1, dtype=np.float64)
    growth = half_ratio * (i * i - i)
    terms = (
        gammaln(order + 1)
        - gammaln(i + 1)
        - gammaln(order - i + 1)
        + i * np.log(rate)
        + (order - i) * np.log1p(-rate)
        + growth
        + np.log(-np.expm1(-growth))
    )
    return float(np.logaddexp(0.0, logsumexp(terms))) * (1 + 1e-12)  # exceeds all rounding errors


def renyi_epsilons(
    divergences: FloatArray, orders: tuple[float, ...], target_delta: float
) -> FloatArray:
    """Returns the epsilon at ``target_delta`` that each order by itself guarantees.

    Returns:
        Shape ``(len(orders),)``, each at least 0.

    Source:
        Balle et al. 2020, arXiv:1905.09982, Theorem 21.
    """
    alphas = np.asarray(orders, dtype=np.float64)
    epsilons = (
        divergences - (np.log(target_delta) + np.log(alphas)) / (alphas - 1) + np.log1p(-1 / alphas)
    )
    return np.asarray(np.maximum(epsilons, 0.0))
