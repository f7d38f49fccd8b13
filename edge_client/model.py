"""A model that a device has installed, opened from Python. Imports neither torch nor Flower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.delivery.store import Installed, serving
from edge_client.inference.answers import labels
from edge_client.inference.confined import ModelLimits, predict
from edge_client.inference.inputs import as_batch
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.config.run import Serving
from fedcore.errors import DataError, DeviceError

Inputs = AnyArray | Sequence[Any]
"""One input or a batch of them: an array, or nested lists of numbers."""


@dataclass(frozen=True)
class EdgeModel:
    """An installed, verified version of a model; `fedcore.open_model` opens one.

    An ONNX file is a program, so every call runs it in a process of its own, with limits on time
    and memory, and checks the digest of the file there. Starting that takes some tenths of a
    second whatever the number of inputs: ask for many at once.

    Example::

        model = fedcore.open_model("device-store", "digits")
        model.version, model.labels
        model.predict(x)  # outputs
        model.predict_labels(x)  # names of the most likely classes
    """

    installed: Installed = field(repr=False)
    threads: int = field(default=Serving().threads, repr=False)
    """Of one inference."""
    limits: ModelLimits = field(default_factory=ModelLimits, repr=False)
    """What the model may take in one call."""

    @property
    def manifest(self) -> Manifest:
        """The signed statement of what the model is, where it comes from and what it cost."""
        return self.installed.manifest

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.model

    @property
    def version(self) -> int:
        """The version that answers."""
        return self.manifest.version

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs; empty where they have none."""
        return self.manifest.labels

    @property
    def damage(self) -> str | None:
        """Why an older version answers in place of the active one; None where the active does."""
        return self.installed.damage

    def predict(self, x: Inputs) -> FloatArray:
        """The model's outputs for one input or a batch.

        Args:
            x: Raw inputs, as the task's clients have them: shape ``input_shape`` for one, or
                ``(B, *input_shape)``, whole numbers or floats.

        Returns:
            Outputs of one input, or ``(B, ...)`` of a batch.

        Raises:
            DataError: the shape is neither, or a number is not finite or does not fit the model's
                type.
            LimitExceeded: the model took more time or memory than it may.
            DeviceError: onnxruntime cannot run it, or an update has replaced the version since it
                was opened; open the model again then.
            ResourceError: no process could be started.
        """
        batch, alone = self._batch(x)
        outputs = predict(
            self.manifest, self.installed.path, batch, threads=self.threads, limits=self.limits
        )
        return outputs[0] if alone else outputs

    def predict_labels(self, x: Inputs) -> str | list[str]:
        """The name of the most likely class of one input, or of each of a batch.

        Args:
            x: As for `predict`.

        Returns:
            A name, or as many as inputs; the class's number where classes have no names.

        Raises:
            DeviceError: the model is no classifier.
            FedcoreError: as `predict`.
        """
        if self.manifest.kind != "classification":
            raise DeviceError(
                f"model {self.name!r} version {self.version}: it is for {self.manifest.kind}, "
                "which has no labels. Nothing was answered; predict() gives its outputs."
            )
        batch, alone = self._batch(x)
        found = labels(self.manifest, self.predict(batch))
        return found[0] if alone else found

    def _batch(self, x: Inputs) -> tuple[AnyArray, bool]:
        """Inputs as a batch, and whether it is of one that was given alone."""
        shape = list(self.manifest.input_shape)
        expected = f"input: expected one of shape {shape} or a batch of shape [B, *{shape}]"
        try:
            values = np.asarray(x)
        except ValueError as error:  # lists of unequal length
            raise DataError(f"{expected}: {error}. Nothing was answered.") from None
        alone = values.shape == self.manifest.input_shape
        return as_batch(values[None] if alone else values, self.manifest, expected=expected), alone


def open_model(
    store: str | PathLike[str],
    name: str,
    *,
    threads: int = Serving().threads,
    limits: ModelLimits | None = None,
) -> EdgeModel:
    """Opens an installed model, once every byte of it has been checked.

    Needs the base package alone: neither torch nor Flower is imported.

    Example::

        model = fedcore.open_model("device-store", "digits")
        outputs = model.predict(x)  # one input or a batch, as an array or nested lists

    Args:
        store: The device's folder, which ``fedcore device update`` installs to.
        name: The model's name.
        threads: Of one inference.
        limits: What it may take in one call; 120 seconds, and memory by its size, when None.

    Returns:
        The active version, or the one before it where the active one is damaged (``damage`` says
        so). It stays the version that was opened, whatever is installed later.

    Raises:
        ConfigError: ``name`` is no model's name.
        DeviceError: no version is installed.
        DigestMismatch: what is installed is damaged, and there is nothing whole to fall back to.
    """
    return EdgeModel(serving(Path(store), name), threads, limits or ModelLimits())
