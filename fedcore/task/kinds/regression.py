"""Regression: one or several quantities for each input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.artifacts.presentation import Presentation
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.metrics import MAE, RMSE, Metric


def _regression_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output.reshape(target.shape), target)


@dataclass(frozen=True)
class Regression(Kind):
    """Outputs and targets ``(B,)`` or ``(B, K)``; targets have the outputs' float dtype."""

    name: str = "regression"
    presentation: Presentation = "values"

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the mean squared error."""
        return _regression_loss

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns root mean squared and mean absolute error."""
        return (RMSE, MAE)

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns floats of as many numbers as the outputs; takes numbers of any real dtype."""
        if targets[0].numel() != outputs.shape.numel():
            raise TargetFault(
                (0,),
                f"a target of shape {tuple(targets.shape[1:])}",
                f"as many numbers as outputs, which have shape {tuple(outputs.shape)}",
                "give the model an output for each number",
            )
        if targets.is_complex() or targets.is_quantized:
            raise TargetFault((0,), f"{targets.dtype}", "real numbers", "give real numbers")
        return targets.to(outputs.dtype) if outputs.dtype.is_floating_point else targets

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields quantities, and the forms that own losses take."""
        count = len(outputs)
        classes = outputs.shape[-1] if outputs.dim() > 1 else 2
        yield torch.randn(tuple(outputs.shape), generator=rng)
        yield torch.randn((count,), generator=rng)
        yield torch.randint(2, tuple(outputs.shape), generator=rng).float()
        yield torch.arange(count) % classes
        yield torch.randint(classes, tuple(outputs.shape[:-1]), generator=rng)

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns the task's own loss with the teacher's outputs as targets."""
        return loss(own, told.reshape(targets.shape).to(targets.dtype))
