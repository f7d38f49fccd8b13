"""Softmax regression 784-10 on MNIST by DDP, against one process: `python softmax.py`."""

import torch
from compare import compare, made
from torch import nn


class Flat(nn.Module):
    """Bytes to roughly zero mean and unit deviation, in a row; part of the exported model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x.float() - 33.3) / 78.6).flatten(1)


task = made("mnist-softmax", lambda: nn.Sequential(nn.Linear(784, 10)), Flat)

if __name__ == "__main__":
    ways = {"1 process": {"processes": 1}, "2 processes": {"processes": 2}}
    compare(__file__, ways, batch_size=256, learning_rate=0.01)
