"""An MLP 256-128-64-10 by Adam, DDP and mixed precision, against float32: `python mlp.py`."""

import torch
from compare import compare, made
from torch import nn
from torch.nn import functional


class Small(nn.Module):
    """Bytes to 16 by 16 numbers in a row, of about unit deviation; part of the exported model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = ((x.float() - 33.3) / 78.6).unsqueeze(1)
        return functional.avg_pool2d(functional.pad(scaled, (2, 2, 2, 2)), 2).flatten(1)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


task = made("mnist-mlp", model, Small)

if __name__ == "__main__":
    ways = {
        "1 process, fp32": {"processes": 1},
        "2 processes, fp32": {"processes": 2},
        "2 processes, bf16": {"processes": 2, "precision": "bf16"},
    }
    compare(__file__, ways, batch_size=256, optimizer="adam", learning_rate=0.001)
