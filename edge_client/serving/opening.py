"""Opens the serving version of a model in a store, for the transports to answer with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.delivery import store as installed
from edge_client.inference.engine import Engine
from edge_client.inference.named import unpacked
from edge_client.serving.protocol import TensorSpec, datatype_of
from fedcore.artifacts.golden import AnyArray, Golden, parse_golden
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.reference import Reference
from fedcore.errors import DeviceError, TrustError
from fedcore.observability.foreign import foreign

_QUICK_S = 2e-3
"""A batch that takes less is run by the thread that received it."""
_TRIED = 5


@dataclass(frozen=True)
class OpenVersion:
    """A `edge_client.serving.batching.ServedVersion` of an installed model."""

    engine: Engine
    manifest: Manifest
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quick: bool
    reference: Reference | None
    """What inputs and outputs were like at the release; None if it does not say."""
    example: Mapping[str, AnyArray]
    """The first golden input, with a batch of one; empty if there is none."""

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.version

    @property
    def rows_together(self) -> int:
        """Most rows that run as one batch."""
        return self.engine.rows_together

    def card(self) -> dict[str, Any]:
        """Returns version, kind, labels, inputs, named outputs and an example, for the page."""
        return {
            "version": self.manifest.version,
            "kind": self.manifest.kind,
            "presents": self.manifest.presents,
            "labels": list(self.manifest.labels),
            "inputs": [
                {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
                for one in self.inputs
            ],
            "outputs": [
                {
                    "name": one.name,
                    "presents": one.presentation,
                    "labels": list(one.labels),
                }
                for one in self.manifest.outputs or ()
            ],
            "input_max": max(
                (float(array.max(initial=0)) for array in self.example.values()), default=1.0
            ),
            "example": {name: array[0].tolist() for name, array in self.example.items()},
        }

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Returns the outputs of a batch; raises as `Engine.run` does."""
        return self.engine.run(inputs)


def opener(*, threads: int, max_batch: int) -> Callable[[Path, str], OpenVersion]:
    """Returns a `edge_client.serving.models.Opener` for engines with these settings."""

    def open_version(store: Path, name: str) -> OpenVersion:
        found = installed.serving(store, name)
        engine = Engine(found.manifest, found.path, found.golden, threads=threads)
        engine.warm_up(rows=max_batch)
        try:
            inputs = tuple(_spec(one) for one in engine.inputs)
            outputs = tuple(_spec(one) for one in engine.outputs)
        except KeyError as error:
            raise DeviceError(
                f"model {name!r} version {found.manifest.version}: the Open Inference Protocol has "
                f"no name for type {foreign(error, 32)}. It is not served; `fedcore device infer` "
                "runs it."
            ) from None
        golden = _golden(found.golden)
        example = _example(found.manifest, golden, inputs) if golden else {}
        quick = not engine.why_confined and _batch_s(engine, example) < _QUICK_S
        reference = golden.reference if golden else None
        return OpenVersion(engine, found.manifest, inputs, outputs, quick, reference, example)

    return open_version


def _spec(info: Any) -> TensorSpec:
    return TensorSpec(info.name, datatype_of(np.dtype(info.dtype)), tuple(info.shape))


def _golden(raw: bytes) -> Golden | None:
    try:
        return parse_golden(raw)
    except TrustError:
        return None


def _example(
    manifest: Manifest, stored: Golden, inputs: tuple[TensorSpec, ...]
) -> dict[str, AnyArray]:
    if manifest.inputs is not None:
        return unpacked(manifest, stored.inputs[:1])
    return {inputs[0].name: stored.inputs[:1]} if len(inputs) == 1 and len(stored.inputs) else {}


def _batch_s(engine: Engine, example: Mapping[str, AnyArray]) -> float:
    """Returns the time of the largest batch, in seconds: the shortest of a few, without noise."""
    if not example:
        return float("inf")
    batch = {
        name: np.repeat(array, engine.rows_together, axis=0) for name, array in example.items()
    }
    best_s = float("inf")
    for _ in range(_TRIED):
        began_s = time.perf_counter()
        engine.run(batch)
        best_s = min(best_s, time.perf_counter() - began_s)
        if best_s > 1.0:
            break
    return best_s
