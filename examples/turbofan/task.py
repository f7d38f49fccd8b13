"""Remaining useful life of jet engines (NASA C-MAPSS FD001): each engine is a client."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task

WINDOW = 30  # cycles that one prediction looks at
CAP = 125  # cycles: a healthy engine shows no sign of how much longer it will last
SENSORS = [6, 7, 8, 11, 12, 13, 15, 16, 17, 18, 19, 21, 24, 25]  # the columns that vary
CLOUD, HELDOUT, CLIENTS = range(1, 9), range(9, 13), range(13, 101)  # engines


def windows(rows: NDArray[np.float64], left_at_end: float) -> TensorDataset:
    """One engine's windows ``(N, WINDOW, sensors)``, and the cycles left after each, of CAP."""
    sensors = rows[:, SENSORS].astype(np.float32)
    left = left_at_end + rows[-1, 1] - rows[:, 1]
    missing = max(0, WINDOW - len(rows))  # seen for fewer cycles: the first stands for those before
    sensors = np.concatenate([np.repeat(sensors[:1], missing, axis=0), sensors])
    view = np.lib.stride_tricks.sliding_window_view(sensors, WINDOW, axis=0).transpose(0, 2, 1)
    targets = np.minimum(left[-len(view) :], CAP) / CAP
    return TensorDataset(torch.tensor(view.copy()), torch.tensor(targets, dtype=torch.float32))


@cache
def load(folder: Path | None) -> dict[int | str, TensorDataset]:
    """The windows of every engine, and as ``test`` the last window of every test engine."""
    if folder is None:
        raise FileNotFoundError("set FEDCORE_DATA to the folder that holds cmapss_fd001")
    here = folder / "cmapss_fd001"
    train, test = (np.loadtxt(here / f"{name}_FD001.txt", skiprows=1) for name in ("train", "test"))
    left = np.loadtxt(here / "RUL_FD001.txt", skiprows=1)
    parts = {unit: windows(train[train[:, 0] == unit], 0) for unit in range(1, 101)}
    last = [windows(test[test[:, 0] == unit], left[unit - 1])[-1:] for unit in range(1, 101)]
    return {**parts, "test": TensorDataset(*map(torch.cat, zip(*last, strict=True)))}


def engines(folder: Path | None, units: range) -> TensorDataset:
    parts = [load(folder)[unit].tensors for unit in units]
    return TensorDataset(*map(torch.cat, zip(*parts, strict=True)))


def model() -> nn.Module:
    size = WINDOW * len(SENSORS)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()),
        nn.Linear(32, 1),
    )


task = Task(
    name="turbofan",
    kind="regression",
    model=model,
    clients=lambda folder: [str(unit) for unit in CLIENTS],
    client_data=lambda client, folder: load(folder)[int(client)],
    cloud_data=lambda folder: engines(folder, CLOUD),
    cloud_heldout=lambda folder: engines(folder, HELDOUT),
    test_data=lambda folder: load(folder)["test"],
    example_input=torch.zeros(WINDOW, len(SENSORS)),
)
