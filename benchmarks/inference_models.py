"""Models for the inference benchmark, released by a repository and installed as on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fedcore
from benchmarks.tasks.models import cnn
from edge_client.delivery.store import read_record
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Lineage, Parity, PrivacyStatement
from fedcore.artifacts.reference import Reference, features_of, measured
from fedcore.files import write_json
from server.compression.export import export_with_scopes
from server.compression.quantise import calibrate, int8_static
from server.compression.reference import binned_features
from server.compression.runtime import answer, open_session
from server.release.draft import Draft
from server.release.publish import initialise, publish


@dataclass(frozen=True)
class Released:
    """A model in a device's store, and the network that it was exported from."""

    store: Path
    name: str
    module: nn.Module = field(repr=False)
    example: Any = field(repr=False)
    """One input, float32."""


class Pixels(nn.Module):
    """Pixels 0..16 to -1..1, as in `examples/digits`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales a batch."""
        return x / 8 - 1


def digits_mlp() -> nn.Module:
    """The network of `examples/digits`, with its preprocessing."""
    return nn.Sequential(
        Pixels(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "digits": (digits_mlp, (64,), False),
    "digits-int8": (digits_mlp, (64,), True),
    "cnn": (cnn, (1, 28, 28), False),
}
"""Network, shape of an input, and whether it is quantised."""


def release(root: Path, workload: str, *, versions: int = 1, reference: bool = False) -> Released:
    """Publishes a model of random weights in so many versions, and installs each in turn.

    Args:
        root: A folder that may be filled; one repository for each workload.
        workload: A name of `WORKLOADS`.
        versions: Each has other weights; the device keeps the last two.
        reference: Whether releases say what inputs and outputs are like, so that a server counts.
    """
    make, shape, quantised = WORKLOADS[workload]
    place = root / (f"{workload}-reference" if reference else workload)
    initialise(place / "repository", place / "keys", now=datetime.now(UTC))
    torch.manual_seed(0)
    examples = torch.rand(64, *shape) * 16
    for _ in range(versions):
        module = make().eval()
        exported = export_with_scopes(module, examples[:2], labels=(), kind="classification")
        onnx = exported.onnx
        if quantised:
            onnx = int8_static(calibrate(onnx, examples), reduce_range=False)
        publish(
            random_draft(
                workload,
                onnx,
                examples[:32].numpy(),
                kind="classification",
                reference=reference,
            ),
            repository=place / "repository",
            keys=place / "keys",
            created=datetime.now(UTC),
        )
        fedcore.update_model(
            place / "store",
            workload,
            repository=place / "repository",
            root=place / "keys" / "root.json",
        )
    return Released(place / "store", workload, module, examples[0].numpy())


def activator(released: Released) -> Callable[[int], None]:
    """Returns what activates one of the two versions that a store holds, by number."""
    records = {}
    for slot in ("active", "previous"):
        record = read_record(released.store, released.name, slot)  # type: ignore[arg-type]
        records[record.version] = record.model_dump(exclude_defaults=True)

    def activate(version: int) -> None:
        write_json(released.store / "models" / released.name / "active", records[version])

    return activate


def random_draft(
    model: str, onnx: bytes, inputs: Any, *, kind: str, reference: bool = False
) -> Draft:
    """A release of a model of random weights, with its own answers to ``inputs`` as golden."""
    outputs = answer(open_session(onnx, threads=1), inputs)
    told = _reference(inputs, outputs) if reference else None
    return Draft(
        model=model,
        onnx=onnx,
        golden=golden_bytes(inputs, outputs, None, told),
        kind=kind,
        labels=(),
        input_shape=inputs.shape[1:],
        input_dtype=str(inputs.dtype),
        golden_tolerance=1e-3 * float(np.abs(outputs).max()),
        lineage=Lineage(
            run="benchmark",
            round=1,
            parent_sha256="0" * 64,
            finetuned=False,
            candidate="fp32",
            config_sha256="0" * 64,
            seed=0,
            calibration="none",
        ),
        privacy=PrivacyStatement(unit="none", epsilon=None, target_delta=None, noise="none"),
        parity=Parity(
            max_abs_error=0.0,
            agreement=1.0,
            metric="accuracy",
            metric_before=0.0,
            metric_after=0.0,
        ),
    )


def _reference(inputs: Any, outputs: Any) -> Reference:
    """Returns the distribution of a few inputs: as many bins as of many, which take as long."""
    features = features_of([("", inputs.shape[1:], inputs.dtype)], outputs.shape[1:], "label")
    found = []
    for side, tensor in (("input", inputs), ("output", outputs)):
        of = [each for each in features if each.side == side]
        values = measured(of, {"": tensor}, "label", np.random.default_rng(0))
        found += binned_features(of, values, None if side == "input" else outputs.shape[1])
    return Reference(presentation="label", features=tuple(found))
