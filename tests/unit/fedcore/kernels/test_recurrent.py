"""The compiled gates against torch's own functions."""

from __future__ import annotations

import numpy as np
import torch

from fedcore.kernels.recurrent import Floats, gru_forward, lstm_forward

K, B = 2, 3


def gates_of(values: Floats) -> Floats:
    """Runs one step of GRUs with these sums for all gates; returns the gates, ``(K, B, 4, H)``."""
    hidden = values.shape[-1]
    given = np.zeros((K, 1, B, 3 * hidden), np.float32)
    given[:] = np.tile(values, 3)
    gates = np.empty((K, 1, B, 4 * hidden), np.float32)
    states = np.zeros((K, 2, B, hidden), np.float32)
    gru_forward(given, np.zeros((K, B, 3 * hidden), np.float32), gates, states, 0)
    return gates[:, 0].reshape(K, B, 4, hidden)


def test_sigmoid_and_tanh_are_torchs_up_to_rounding() -> None:
    values = np.linspace(-30, 30, 20_001, dtype=np.float32)
    reset, update, candidate, _ = gates_of(values)[1, 2]
    wide = torch.from_numpy(values).double()
    for found, expected in (
        (reset, wide.sigmoid()),
        (update, wide.sigmoid()),
        (candidate, wide.tanh()),
    ):
        assert np.abs(found - expected.numpy()).max() < 3e-7


def test_what_is_not_finite_shows() -> None:
    values = np.array([np.nan, np.inf, -np.inf], np.float32)
    reset, _, candidate, _ = gates_of(values)[0, 0]
    assert np.isnan([reset[0], candidate[0]]).all()
    assert np.abs(reset[1:] - [1, 0]).max() < 3e-7
    assert np.abs(candidate[1:] - [1, -1]).max() < 3e-7


def test_a_cell_keeps_what_its_gates_let_through() -> None:
    """An LSTM whose forget gate is open and whose input gate is shut."""
    hidden = 5
    given = np.tile(np.repeat([-40, 40, 0, 40], hidden), (K, 1, B, 1)).astype(np.float32)
    cells, states = (np.zeros((K, 2, B, hidden), np.float32) for _ in range(2))
    cells[:, 0] = 0.5
    gates, squashed = np.empty_like(given), np.empty((K, 1, B, hidden), np.float32)
    products = np.zeros((K, B, 4 * hidden), np.float32)
    lstm_forward(given, products, gates, cells, squashed, states, 0)
    assert np.abs(cells[:, 1] - 0.5).max() < 1e-6
    assert np.abs(states[:, 1] - np.tanh(0.5)).max() < 1e-6
