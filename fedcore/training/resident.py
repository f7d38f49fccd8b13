"""Keeps a client's model in memory across messages."""

from __future__ import annotations

from fedcore.task.model import FullModel, load_preprocess
from fedcore.updates.messages import Instruction
from fedcore.updates.pack import layout_of, unpack


class Resident:
    """A model that stays in memory across messages, with its state reset for each."""

    def __init__(self, model: FullModel) -> None:
        self.model = model
        self.layout = layout_of(model.model)
        # State that messages don't carry: counters, and buffers that the state dict omits.
        self._kept = {
            name: buffer.clone()
            for name, buffer in model.model.named_buffers()
            if name not in self.layout.names
        }
        self._preprocess: bytes | None = None

    def load(self, instruction: Instruction) -> FullModel:
        """Returns the model with the server's weights and preprocessing, and no earlier state."""
        if instruction.preprocess != self._preprocess:
            load_preprocess(instruction.preprocess, self.model)
            self._preprocess = instruction.preprocess
        unpack(instruction.weights, self.model.model)
        if self._kept:
            for name, buffer in self.model.model.named_buffers():
                if name in self._kept:
                    buffer.copy_(self._kept[name])
        self.model.zero_grad(set_to_none=True)
        return self.model
