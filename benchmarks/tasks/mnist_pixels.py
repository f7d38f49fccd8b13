"""The example's MNIST and clients, with logistic regression on pixels in place of its features."""

from dataclasses import replace
from pathlib import Path

from models import logistic
from torch import Tensor, nn

from fedcore.task.definition import load_task


class Scale(nn.Module):
    """Bytes to 0..1, flat."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 255


_EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist_private" / "task.py"
task = replace(load_task(_EXAMPLE), name="mnist_pixels", model=logistic, preprocess=Scale)
