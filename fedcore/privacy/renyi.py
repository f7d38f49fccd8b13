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

    Returns:
        Shape ``(len(orders),)``, see `renyi_table`.
    """
    table = renyi_table(np.array([noise_multiplier]), np.array([sample_rate]), orders)
    first: FloatArray = table[0]
    return first


def renyi_table(
    noise_multipliers: FloatArray, sample_rates: FloatArray, orders: tuple[float, ...]
) -> FloatArray:
    """Returns one step's cost of each mechanism at each order (2 or more), in the worse direction.

    Integer orders have a finite sum. Orders between are bounded by linear interpolation, as the
    logarithm of a moment is convex in the order: the exact series for those does not end in
    reasonable time near a rate of one half, and turns negative at large noise.

    Args:
        noise_multipliers: Of each mechanism, shape ``(M,)``.
        sample_rates: Of each mechanism, shape ``(M,)``.
        orders: The orders.

    Returns:
        Shape ``(M, len(orders))``, each at least 0; infinite beyond float range.

    Source:
        Mironov, Talwar, Zhang 2019, arXiv:1908.10530, sections 3.1 and 3.3.
    """
    alphas = np.asarray(orders, dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        half_ratios = 0.5 / np.square(np.asarray(noise_multipliers, np.float64))
        costs = half_ratios[:, None] * alphas
        sampled = np.asarray(sample_rates) != 1
        if sampled.any():
            whole = sorted({*map(math.floor, orders), *map(math.ceil, orders)})
            ratios, rates = half_ratios[sampled], np.asarray(sample_rates)[sampled]
            moments = np.stack([_log_moments(order, ratios, rates) for order in whole], axis=1)
            if tuple(whole) != tuple(orders):
                moments = np.stack([np.interp(alphas, whole, row) for row in moments])
            costs[sampled] = moments / (alphas - 1)
    return np.asarray(np.nan_to_num(costs, nan=np.inf, posinf=np.inf))


def _log_moments(order: int, half_ratios: FloatArray, rates: FloatArray) -> FloatArray:
    """Returns moments' logarithms ``(M,)`` as ``log(1 + x)``, which is accurate for tiny ``x``."""
    i = np.arange(2, order + 1, dtype=np.float64)
    growth = half_ratios[:, None] * (i * i - i)
    terms = (
        (gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1))
        + i * np.log(rates)[:, None]
        + (order - i) * np.log1p(-rates)[:, None]
        + growth
        + np.log(-np.expm1(-growth))
    )
    found = np.logaddexp(0.0, logsumexp(terms, axis=1))
    return np.asarray(found * (1 + 1e-12))  # exceeds all rounding errors


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
