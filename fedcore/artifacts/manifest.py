"""The manifest: what a released model is, where it came from, and how to tell that it is whole."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.errors import TrustError
from fedcore.observability.faults import first_fault

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MAX_MANIFEST_BYTES = 1 << 20  # 1 MiB: lineage and labels, never weights
MAX_VERSION = 10**15
MAX_MODEL_BYTES = 2 << 30  # 2 GiB: the most that protobuf, and so one ONNX file, can hold


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Part):
    """One file of the release."""

    path: str
    """Target path in the repository, ``models/<model>/<version>/<file>``."""
    sha256: Digest
    length: Annotated[int, Field(ge=1, le=MAX_MODEL_BYTES)]


class Lineage(_Part):
    """Where the weights came from."""

    run: str
    """Name of the run."""
    round: int
    """The round whose global model went on to fine-tuning."""
    parent_sha256: Digest
    """Digest of that global model's safetensors file."""
    finetuned: bool
    candidate: str
    """The compression candidate that was chosen."""
    config_sha256: Digest
    """Digest of the resolved configuration, as JSON."""
    seed: int
    calibration: str
    """What data quantisation and pruning saw, or ``none``."""
    rollback_of: int | None = None
    """The version whose bytes these are, when an older one was published again on purpose."""


class ClientStatement(_Part):
    """What the models of a run guarantee to each client, with all of its data.

    For whoever gets its models, one or all: the server sees each client's update as it is.
    """

    epsilon: float
    """Of the models of all rounds together."""
    target_delta: float
    adjacency: Literal["zero_out_client"] = "zero_out_client"
    """Neighbours differ in one client, whose updates count as no difference in one of them."""
    mechanism: Literal["gaussian", "matrix"]
    noise_multiplier: float
    """Deviation of the noise on a sum of updates, over the bound of one."""
    clip_norm: float | Literal["adaptive"]
    sample_rate: float
    """The probability with which each client took part in a round, in secret and independently;
    1 where nobody's absence was counted on."""
    separation: int | None
    """Rounds in which no client took part twice; None where none is enforced."""
    clients: int
    """Those that rounds drew from."""
    rounds: int
    accountant: Literal["rdp", "prv"]


class PrivacyStatement(_Part):
    """What the training guarantees to those whose data it used."""

    unit: Literal["none", "example", "client", "both"]
    epsilon: float | None
    """Of each example: the most that any client spent, accumulated over all rounds; None where
    examples are not protected."""
    target_delta: float | None
    noise: Literal["none", "simulated", "system"]
    """``simulated``: drawn from the run's seed, so no real protection."""
    client: ClientStatement | None = None
    """Of each client; None where clients are not protected."""


class Parity(_Part):
    """How the released file compares with the model that it was exported from."""

    max_abs_error: float
    """Largest difference of an output, over the golden inputs."""
    agreement: float
    """Share of equal decisions on the cloud's held-out data (see `fedcore.artifacts.parity`)."""
    metric: str
    metric_before: float
    metric_after: float
    """The primary metric on the cloud's held-out data, before and after compression."""


class TestStatement(_Part):
    """What the final test split said, which nothing was chosen by."""

    __test__ = False  # no test of pytest's

    metric: str
    """The primary one."""
    examples: Annotated[int, Field(ge=1)]
    federated: float | None
    """Of the model of the rounds, before fine-tuning and compression; None if it is no number."""
    released: float | None
    """Of the released file."""


class Manifest(_Part):
    """Everything about one version of a released model.

    Timings are left out: they differ from device to device, and what is signed must not.

    Example::

        manifest = fedcore.publish(result.compressed, result, repository="releases", keys="keys")
        manifest.version, manifest.lineage.round, manifest.privacy.epsilon
        fedcore.open_model("device-store", "digits").manifest  # of what a device has installed
    """

    format: Literal[1] = 1
    model: str
    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]
    created: str
    """UTC, ISO 8601, to the second."""
    kind: Literal["classification", "regression", "next_token"]
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    """Shape of one input, without the batch dimension."""
    input_dtype: str
    onnx: FileEntry
    golden: FileEntry
    golden_tolerance: Annotated[float, Field(gt=0)]
    """The self-test allows each output to differ by so much, absolutely."""
    lineage: Lineage
    privacy: PrivacyStatement
    parity: Parity
    test: TestStatement | None = None
    """None where nobody tested."""


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as canonical JSON: sorted keys, no optional white space."""
    return json.dumps(
        manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":")
    ).encode()


def parse_manifest(raw: bytes) -> Manifest:
    """Reads a manifest that was delivered.

    Raises:
        TrustError: it is no manifest of this format.
    """
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise TrustError(
            f"manifest: {first_fault(error)}. The release was not installed; the version before "
            "keeps serving."
        ) from None
