"""Air in a city: twelve stations, each of which has measured for a single month so far."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task

HOURS, AHEAD, MONTH = 24, 6, 30 * 24  # one looks back over a day, and six hours ahead
COLUMNS = (5, 11, 12, 13, 16)  # PM2.5, temperature, pressure, dew point, wind speed
TESTED = 3 * 365 * 24  # the last year, every seventh hour


@cache
def station(path: Path) -> NDArray[np.float32]:
    """Hours of one station ``(N, 5)``, log(1 + PM2.5) first; gaps hold the value before them."""
    rows = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=COLUMNS, dtype=np.float32)
    for column in rows.T:
        known = np.maximum.accumulate(np.where(np.isnan(column), 0, np.arange(len(column))))
        column[:] = np.nan_to_num(column[known])
    rows[:, 0] = np.log1p(rows[:, 0])
    return rows


def windows(rows: NDArray[np.float32], step: int) -> TensorDataset:
    """A day of hours ``(N, 24, 5)``, and by how much log(1 + PM2.5) changes in the next six."""
    view = np.lib.stride_tricks.sliding_window_view(rows[:-AHEAD], HOURS, axis=0)[::step]
    change = rows[HOURS + AHEAD - 1 :: step, 0][: len(view)] - view[:, 0, -1]
    return TensorDataset(torch.tensor(view.transpose(0, 2, 1).copy()), torch.tensor(change))


def files(folder: Path | None) -> dict[str, Path]:
    found = sorted((folder / "beijing_air").glob("PRSA_Data_*.csv"))
    return {path.name.split("_")[2]: path for path in found}


def first_month(name: str, folder: Path | None) -> TensorDataset:
    """Stations began in different months of the first year."""
    begin = list(files(folder)).index(name) * MONTH
    return windows(station(files(folder)[name])[begin : begin + MONTH], 1)


task = Task(
    name="air",
    kind="regression",
    model=lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(HOURS * 5, 32), nn.ReLU(), nn.Linear(32, 1)
    ),
    clients=lambda folder: list(files(folder)),
    client_data=first_month,
    client_test=lambda name, folder: windows(station(files(folder)[name])[TESTED:], 7),
    example_input=torch.zeros(HOURS, 5),
)
