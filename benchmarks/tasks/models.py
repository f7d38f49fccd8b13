"""The models of the workloads."""

from torch import nn


def logistic() -> nn.Module:
    """Logistic regression on flat images: 7,850 parameters."""
    return nn.Linear(784, 10)


def cnn() -> nn.Module:
    """Two convolutions and two dense layers: 121,930 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 25, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
