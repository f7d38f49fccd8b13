"""What changes during training: weights, and the state of optimiser and loss scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes during training, except the position."""

    model: nn.Module
    """The trained model without wrappers; its tensors may be sharded."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    """Loss scaling of half precision."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name, each once; changing one changes the state."""
        found, seen = dict[str, Tensor](), set[int]()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # tied weights appear under several names
                seen.add(id(tensor))
                found[f"model.{name}"] = tensor.detach()
        for name, parameter in self._trained():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{key}.{name}"] = value
        return found

    def prepare(self, saved: Mapping[str, torch.Size]) -> None:
        """Gives the optimiser the state tensors that a checkpoint has, with any values.

        Args:
            saved: Shape of each tensor in the checkpoint, by name.
        """
        self.optimizer.state.clear()
        for name, parameter in self._trained():
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                shape = saved.get(f"optimizer.{key}.{name}")
                if shape is None:
                    continue
                whole = shape == parameter.shape
                # The number of steps stays on the CPU unless the optimiser is fused.
                fused = self.optimizer.defaults.get("fused")
                single = torch.zeros((), device=parameter.device if fused else "cpu")
                self.optimizer.state[parameter][key] = (
                    torch.zeros_like(parameter.detach()) if whole and key != "step" else single
                )

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, each) for name, each in self.model.named_parameters() if each.requires_grad)
