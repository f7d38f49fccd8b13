"""Python interface to a device's installed models. Imports neither torch nor Flower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.delivery.store import Installed, serving
from edge_client.inference.answers import LABELLED, label_sets, labels
from edge_client.inference.decoder import Decoder
from edge_client.inference.direct import RowCall
from edge_client.inference.engine import Engine
from edge_client.inference.generate import Sampling, continued, prompt_tokens
from edge_client.inference.inputs import array_of, as_batch
from edge_client.inference.named import output_named, outputs_by_name, packed
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.artifacts.presentation import probabilities
from fedcore.errors import DataError, DeviceError

Inputs = AnyArray | Sequence[Any] | Mapping[str, Any]
"""One input or a batch of them: an array, or nested lists of numbers; or one of these by name."""


@dataclass(frozen=True)
class EdgeModel:
    """An installed, verified version of a model, opened by `fedcore.open_model`.

    An ONNX file is a program. The first call loads it in a process with limits on time and memory,
    and tries it there. Then it runs in this process, in microseconds, if its work depends on
    nothing but the shape of its input; otherwise it stays in the process with limits
    (`why_confined`). Inputs run one at a time, whatever their number.

    Example::

        model = fedcore.open_model("device-store", "digits")
        model.version, model.labels
        model.predict(x)  # outputs
        model.predict_labels(x)  # names of the most likely classes
    """

    installed: Installed = field(repr=False)
    threads: int | None = field(default=None, repr=False)
    """Threads of one inference; None for what is fastest on this machine."""
    limits: ModelLimits = field(default_factory=ModelLimits, repr=False)
    """Time and memory that one call may use in a process with limits."""
    engine: Engine = field(init=False, repr=False, compare=False)
    """Runs the model; `warm_up` loads it."""
    decoder: Decoder = field(init=False, repr=False, compare=False)
    """Generates tokens; the first `generate` loads it."""

    def __post_init__(self) -> None:
        installed = self.installed
        engine = Engine(
            installed.manifest,
            installed.path,
            installed.golden,
            threads=self.threads,
            limits=self.limits,
            tuning=installed.tuning,
        )
        object.__setattr__(self, "engine", engine)
        of = (installed.manifest, installed.path, installed.golden)
        decoder = Decoder(*of, threads=self.threads, limits=self.limits)
        object.__setattr__(self, "decoder", decoder)

    @property
    def manifest(self) -> Manifest:
        """The signed manifest: the model's inputs and outputs, lineage and privacy cost."""
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
        """Names of the classes, in the order of the outputs; empty if the classes have no names."""
        return self.manifest.labels

    @property
    def damage(self) -> str | None:
        """Why an older version answers in place of the active one; None if the active one does."""
        return self.installed.damage

    @property
    def why_confined(self) -> str:
        """Why the model runs in a process with limits; empty if it runs in this one."""
        return self.engine.why_confined

    def warm_up(self) -> None:
        """Loads the model, so that the first call is as fast as the rest.

        Raises:
            LimitExceeded: the model exceeded its limits on time or memory.
            DeviceError: onnxruntime cannot run the model; or an update has replaced the version
                since it was opened.
            ResourceError: no process could be started.
        """
        self.engine.warm_up()

    def predict(self, x: Inputs) -> FloatArray:
        """Returns the model's outputs for one input or a batch.

        Args:
            x: Raw inputs without preprocessing, integers or floats: shape ``input_shape`` for one
                input, ``(B, *input_shape)`` for a batch. For a model with named inputs a
                dictionary of them: each of its own shape for one example, or a batch of each.

        Returns:
            Outputs of the one input, or ``(B, ...)`` for a batch. Of a model with several outputs
            by name a vector of all, in the order of the manifest; `predict_named` gives each.

        Raises:
            DataError: ``x`` has another shape, or a number is not finite or does not fit the
                model's type.
            LimitExceeded: the model exceeded its limits on time or memory.
            DeviceError: onnxruntime cannot run the model; or an update has replaced the version
                before it was loaded, and the model must be opened again.
            ResourceError: no process could be started.
        """
        # One input in the model's own form, as most calls have it, takes the shortest way.
        row = self.engine.row
        if row is not None and (found := row(x)) is not None:
            return found
        if row is not None and (several := self._rows(row, x)) is not None:
            return several
        batch, alone = self._batch(x)
        outputs = self.engine.run_rows(batch)
        return outputs[0] if alone else outputs

    def predict_named(self, x: Inputs) -> dict[str, FloatArray]:
        """Returns the model's outputs by name, for one input or a batch.

        Args:
            x: Raw inputs (see `predict`).

        Returns:
            The outputs that the manifest names, each in its own shape; ``output`` alone for a model
            with one.

        Raises:
            DataError, LimitExceeded, DeviceError, ResourceError: see `predict`.
        """
        batch, alone = self._batch(x)
        found = outputs_by_name(self.manifest, self.predict(batch))
        return {name: each[0] for name, each in found.items()} if alone else found

    def predict_probabilities(self, x: Inputs, *, output: str | None = None) -> FloatArray:
        """Returns the probabilities of classes or labels, for one input or each input of a batch.

        Args:
            x: Raw inputs: shape ``input_shape`` for one input, ``(B, *input_shape)`` for a batch.
            output: Which of several outputs with names; None for a model with one.

        Returns:
            In the shape of the outputs, with a sum of 1 over the classes. For ``binary`` the
            probability of the second class, and for ``multilabel`` one for each label.

        Raises:
            DeviceError: the model has no classes, or cannot be run (see `predict`).
            DataError: the inputs are not valid (see `predict`).
            LimitExceeded: the model exceeded its limits on time or memory.
            ResourceError: no process could be started.
        """
        manifest = self._of(output)
        if manifest.presents == "values":
            raise self._without("probabilities")
        batch, alone = self._batch(x)
        found = probabilities(self._outputs(batch, output), manifest.presents)
        return found[0] if alone else found

    def predict_labels(
        self, x: Inputs, *, output: str | None = None
    ) -> str | list[str] | list[list[str]]:
        """Returns the name of the most likely class, for one input or each input of a batch.

        Args:
            x: Raw inputs: shape ``input_shape`` for one input, ``(B, *input_shape)`` for a batch.
            output: Which of several outputs with names; None for a model with one.

        Returns:
            One name, or a list of B names; the class's index as text if classes have no names. For
            ``multilabel`` a list of names for each input: those of labels with a positive logit.

        Raises:
            DeviceError: the model gives no label to an input, or cannot be run (see `predict`).
            DataError: the inputs are not valid (see `predict`).
            LimitExceeded: the model exceeded its limits on time or memory.
            ResourceError: no process could be started.
        """
        manifest = self._of(output)
        if manifest.presents not in LABELLED:
            raise self._without("labels")
        batch, alone = self._batch(x)
        outputs = self._outputs(batch, output)
        if manifest.presents == "labels":
            sets = label_sets(manifest, outputs)
            return sets[0] if alone else sets
        found = labels(manifest, outputs)
        return found[0] if alone else found

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Continues a sequence of tokens, and yields each as soon as it is drawn.

        A token costs the work of one token where the release has a decode graph, which keeps keys
        and values of earlier tokens; and one inference of the whole window otherwise
        (``decoder.why_not`` says why). Past the window the model sees the last tokens: with a
        decode graph from half a window to a whole one, without it always a whole one.

        Args:
            prompt: At least one token; of a longer prompt the model sees the last ones. Text, for a
                model whose labels are single characters.
            tokens: Number of tokens to yield.
            temperature: Divides the logits, >= 0: higher is more surprising, 0 always takes the
                most likely token.
            top_k: Draws from this many of the most likely tokens alone; from all when None.
            seed: Seed of the sampling: equal seeds give equal tokens on one machine. Random when
                None.

        Raises:
            DataError: the prompt is empty or has tokens without a label, or ``temperature`` or
                ``top_k`` is out of range.
            DeviceError: the model does not give the next token, or cannot be run (see `predict`),
                for example because it does not know a token.
            LimitExceeded: the model exceeded its limits on time or memory.
            ResourceError: no process could be started.
        """
        if self.manifest.presents != "tokens" or len(self.manifest.input_shape) != 1:
            raise self._without("next token")
        first = prompt_tokens(prompt, self.labels)
        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
        window, dtype = self.manifest.input_shape[0], self.manifest.input_dtype
        return islice(
            continued(self.decoder, self.predict, first, sampling, window=window, dtype=dtype),
            max(0, tokens),
        )

    def _of(self, output: str | None) -> Manifest:
        """Returns the manifest as that of a model with this output alone."""
        if output is None:
            return self.manifest
        return self.manifest.of_output(output_named(self.manifest, output))

    def _outputs(self, batch: AnyArray, output: str | None) -> FloatArray:
        found = self.predict(batch)
        return found if output is None else outputs_by_name(self.manifest, found)[output]

    def _rows(self, row: RowCall, x: Inputs) -> FloatArray | None:
        """Answers a batch in the model's own form; None for anything else."""
        if type(x) is not np.ndarray or not x.size or x.shape[1:] != self.manifest.input_shape:
            return None
        found = []
        for each in x:
            if (outputs := row(each)) is None:
                return None
            found.append(outputs)
        return np.stack(found)

    def _without(self, what: str) -> DeviceError:
        return DeviceError(
            f"model {self.name!r} version {self.version}: its kind is {self.manifest.kind}, which "
            f"has no {what}. Nothing was answered; predict() gives its outputs."
        )

    def _batch(self, x: Inputs) -> tuple[AnyArray, bool]:
        """Returns the inputs as a batch, and whether ``x`` was a single input."""
        if isinstance(x, Mapping):
            if self.manifest.inputs is None:
                raise DataError(
                    f"input: model {self.name!r} version {self.version} takes one input without a "
                    "name, got a dictionary. Nothing was answered; give its value."
                )
            return packed(self.manifest, x, where="input")
        shape = list(self.manifest.input_shape)
        expected = f"input: expected one of shape {shape} or a batch of shape [B, *{shape}]"
        try:
            values = array_of(x)
        except ValueError as error:  # no array of numbers
            raise DataError(f"{expected}: {error}. Nothing was answered.") from None
        alone = values.shape == self.manifest.input_shape
        return as_batch(values[None] if alone else values, self.manifest, expected=expected), alone


def open_model(
    store: str | PathLike[str],
    name: str,
    *,
    threads: int | None = None,
    limits: ModelLimits | None = None,
) -> EdgeModel:
    """Opens an installed model, after checking every byte of it.

    Needs only the base package: imports neither torch nor Flower.

    Example::

        model = fedcore.open_model("device-store", "digits")
        outputs = model.predict(x)  # one input or a batch, as an array or nested lists

    Args:
        store: The store that `fedcore.update_model` installs to.
        name: The model's name.
        threads: Threads of one inference. When None, the first call measures for about a second
            what is fastest on this machine, and the store remembers it; a model that answers within
            100 microseconds gets one thread at once.
        limits: Time and memory that one call may use; when None, 120 seconds, and memory by the
            size of the model.

    Returns:
        The active version; if it is damaged, the previous one, with the reason in ``damage``. The
        object keeps its version when a later one is installed.

    Raises:
        ConfigError: ``name`` is not a valid name.
        DeviceError: no version is installed.
        DigestMismatch: the active version is damaged, and no intact previous version exists.
    """
    return EdgeModel(serving(Path(store), name), threads, limits or ModelLimits())
