"""Heart disease at four hospitals: each one's patients stay there, and few have every test."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore import Task, iid

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
NUMBERS = (0, 3, 4, 7, 9, 11)  # age, pressure, cholesterol, heart rate, ST depression, vessels
TYPICAL, SPREAD = (54.0, 132.0, 220.0, 138.0, 0.9, 0.7), (9.0, 19.0, 60.0, 26.0, 1.1, 0.9)
CODES = {1: 2, 2: 5, 5: 2, 6: 3, 8: 2, 10: 4, 12: 8}  # of sex, pain, ...: as many as these


@cache
def patients(hospital: str, folder: Path | None) -> dict[str, TensorDataset]:
    """A hospital's patients, ``(13,)`` findings with NaN for those missing; a third are a test."""
    path = folder / "heart_disease" / f"processed.{hospital}.data"
    rows = np.genfromtxt(path, delimiter=",", missing_values="?", dtype=np.float32)
    inputs, targets = torch.tensor(rows[:, :13]), torch.tensor(rows[:, 13] > 0).float()
    inputs[inputs[:, 4] == 0, 4] = torch.nan  # Switzerland and VA write 0 for no cholesterol
    thirds = iid(len(rows), 3, seed=0)
    parts = {"train": [*thirds[0], *thirds[1]], "test": list(thirds[2])}
    return {name: TensorDataset(inputs[part], targets[part]) for name, part in parts.items()}


class Findings(nn.Module):
    """Findings as numbers from about -2 to 2, and codes one by one; 0 where one is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("typical", torch.tensor(TYPICAL))
        self.register_buffer("spread", torch.tensor(SPREAD))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = torch.nan_to_num((x[:, list(NUMBERS)] - self.typical) / self.spread)
        codes = [(x[:, place] == code).float() for place in CODES for code in range(CODES[place])]
        return torch.cat([numbers, torch.stack(codes, dim=1)], dim=1)


task = Task(
    name="hospitals",
    kind="binary",
    model=lambda: nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)),
    preprocess=Findings,
    clients=lambda folder: HOSPITALS,
    client_data=lambda hospital, folder: patients(hospital, folder)["train"],
    client_test=lambda hospital, folder: patients(hospital, folder)["test"],
    example_input=torch.zeros(13),
    metrics=(fedcore.metrics.AUC, fedcore.metrics.accuracy(axis=None)),
    labels=("healthy", "ill"),
)
