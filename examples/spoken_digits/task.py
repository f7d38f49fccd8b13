"""Spoken digits: every speaker is a client; tested on a speaker whom nobody has heard."""

import wave
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task

TEST = "yweweler"
SAMPLES, WINDOW, HOP = 8192, 256, 128  # one second at 8 kHz; longer recordings end there


@cache
def recordings(speaker: str, folder: Path | None) -> TensorDataset:
    """A speaker's recordings as pictures ``(N, 1, 32, 65)``: log power by frequency and time."""
    sounds, digits = [], []
    for path in sorted((folder / "spoken_digits").glob(f"*_{speaker}_*.wav")):
        with wave.open(str(path)) as file:
            sound = np.frombuffer(file.readframes(SAMPLES), np.int16).astype(np.float32) / 2**15
        sounds.append(np.pad(sound, (0, SAMPLES - len(sound))))
        digits.append(int(path.name[0]))
    window = torch.hann_window(WINDOW)
    found = torch.stft(
        torch.tensor(np.stack(sounds)), WINDOW, HOP, window=window, return_complex=True
    )
    power = found.abs()[:, :128].square().reshape(len(sounds), 32, 4, -1).mean(dim=2)
    return TensorDataset(torch.log(power + 1e-6)[:, None], torch.tensor(digits))


def model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 8, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Scale(nn.Module):
    """Log power from -14 to 10 to about -1 to 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 8) / 6


task = Task(
    name="spoken-digits",
    kind="classification",
    model=model,
    preprocess=Scale,
    clients=lambda folder: ["george", "jackson", "lucas", "nicolas", "theo"],
    client_data=recordings,
    test_data=lambda folder: recordings(TEST, folder),
    example_input=torch.zeros(1, 32, 65),
    labels=tuple("0123456789"),
)
