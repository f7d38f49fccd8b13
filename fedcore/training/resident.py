"""Keeps a client's model in memory across messages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcore.task.model import FullModel, load_preprocess
from fedcore.updates.frozen import checksums, frozen_state, load_frozen, received
from fedcore.updates.local import load_local, local_names, local_tensors
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
            if name not in self.layout.names and name not in local_names(model.model)
        }
        self._local = self._initial_local()
        self._preprocess: bytes | None = None
        self._frozen_sha256 = frozen_state(model.model).sha256
        self.checksums = checksums(model.model)
        """Of the frozen parameters, see `fedcore.updates.frozen.check_unchanged`."""

    def _initial_local(self) -> Mapping[str, Tensor]:
        return {name: one.detach().clone() for name, one in local_tensors(self.model.model).items()}

    def load(self, instruction: Instruction, local: bytes = b"") -> FullModel:
        """Returns the model with the server's weights and preprocessing, and no earlier state.

        Args:
            instruction: The server's request.
            local: The client's own layers, see `fedcore.updates.local`; the initial ones if empty.

        Raises:
            InvalidUpdate: They do not fit this model, or frozen parameters are missing.
            DataError: ``local`` does not fit it.
        """
        if instruction.preprocess != self._preprocess:
            load_preprocess(instruction.preprocess, self.model)
            self._preprocess = instruction.preprocess
        if instruction.frozen_sha256 != self._frozen_sha256:
            self._frozen_sha256 = ""  # what is there if loading fails half-way is unknown
            load_frozen(received(instruction), self.model.model)
            self._frozen_sha256 = instruction.frozen_sha256
            self.checksums = checksums(self.model.model)
            self._local = self._initial_local()
        if local:
            load_local(local, self.model.model)
        else:
            with torch.no_grad():
                for name, tensor in local_tensors(self.model.model).items():
                    tensor.copy_(self._local[name])
        unpack(instruction.weights, self.model.model)
        if self._kept:
            for name, buffer in self.model.model.named_buffers():
                if name in self._kept:
                    buffer.copy_(self._kept[name])
        self.model.zero_grad(set_to_none=True)
        return self.model
