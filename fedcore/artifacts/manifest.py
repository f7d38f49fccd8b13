"""The manifest of a released model: its files, interface, origin, privacy and test results."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcore.artifacts.presentation import Presentation, presentation_of
from fedcore.errors import TrustError
from fedcore.observability.faults import first_fault

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MAX_MANIFEST_BYTES = 1 << 20  # 1 MiB: lineage and labels, never weights
MAX_VERSION = 10**15
MAX_MODEL_BYTES = 2 << 30  # 2 GiB: protobuf's limit, and so the limit of one ONNX file


MOST_INPUTS = 64
"""Most inputs with names that a manifest describes."""
MOST_OUTPUTS = 64
"""Most outputs with names that a manifest describes."""
MOST_MISSING = 4096
MissingAllowed = (
    Literal["all"]
    | Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**31)], ...],
        Field(min_length=1, max_length=MOST_MISSING),
    ]
)
"""Positions of an input that may be missing, or all of them."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Part):
    """One file of the release."""

    path: str
    """Target path in the repository, ``models/<model>/<version>/<file>``."""
    sha256: Digest
    length: Annotated[int, Field(ge=1, le=MAX_MODEL_BYTES)]


class Lineage(_Part):
    """Origin of the weights."""

    run: str
    """Name of the run."""
    round: int
    """The round whose global model was fine-tuned."""
    parent_sha256: Digest
    """Digest of that global model's safetensors file."""
    finetuned: bool
    candidate: str
    """The compression candidate that was selected."""
    config_sha256: Digest
    """Digest of the resolved configuration, as JSON."""
    seed: int
    calibration: str
    """The data that quantisation and pruning used, or ``none``."""
    initial_sha256: Digest | None = None
    """Digest of the checkpoint that the run started from; None if there is none."""
    rollback_of: int | None = None
    """The version with identical bytes, if an older one was published again on purpose."""


class ClientStatement(_Part):
    """Client-level guarantee of a run's models, for each client with all of its data.

    It holds against everyone who receives the models, one or all, but not against the server, which
    sees each client's unprotected update.
    """

    epsilon: float
    """Epsilon of the models of all rounds together."""
    target_delta: float
    adjacency: Literal["zero_out_client"] = "zero_out_client"
    """Neighbours differ in one client, whose updates count as zero difference in one of them."""
    mechanism: Literal["gaussian", "matrix"]
    noise_multiplier: float
    """Deviation of the noise on a sum of updates, over the norm bound of one update."""
    clip_norm: float | Literal["adaptive"]
    sample_rate: float
    """The probability with which each client took part in a round, in secret and independently;
    1 if the guarantee does not rely on absence."""
    separation: int | None
    """Number of consecutive rounds in which no client took part twice; None if not enforced."""
    clients: int
    """Number of clients that rounds drew from."""
    rounds: int
    accountant: Literal["rdp", "prv"]


class EvaluationStatement(_Part):
    """Evaluations of models by clients on held-out examples, by sums with noise."""

    epsilon: float
    """Epsilon of each held-out example: of as many evaluations as any client can have made. Such
    examples are not trained on, so it does not add to the epsilon of training."""
    target_delta: float
    noise_multiplier: float
    """Deviation of the noise on sums, over the most that one example moves them by."""
    evaluations: Annotated[int, Field(ge=1)]
    """Models that clients were asked to evaluate."""


class CloudStatement(_Part):
    """Guarantee of each example that the cloud fine-tuned on, by DP-SGD with system noise.

    It holds against everyone who receives the models, but not against the cloud. Held-out data, by
    which the cloud judges and calibrates, are not covered.
    """

    epsilon: float
    """Epsilon of all trainings on these data that the cloud's ledger records."""
    target_delta: float
    noise_multiplier: float
    """Deviation of this training's noise on a sum of gradients, over ``clip_norm``."""
    clip_norm: float
    sample_rate: float
    """Probability of each example to be in a step's batch."""
    steps: Annotated[int, Field(ge=1)]
    trainings: Annotated[int, Field(ge=1)]
    """Trainings that the ledger records, with this one."""
    accountant: Literal["rdp", "prv"]


class PrivacyStatement(_Part):
    """Privacy guarantee of the training for the owners of the clients' data.

    The cloud's data, which fine-tuning and compression read, are covered by ``cloud`` alone.
    """

    unit: Literal["none", "example", "client", "both"]
    epsilon: float | None
    """Epsilon of each example: the most that any client spent, over all rounds; None if examples
    are not protected."""
    target_delta: float | None
    noise: Literal["none", "simulated", "system"]
    """``simulated``: drawn from the run's seed, so no real protection."""
    before: Literal["nothing", "not known"] = "nothing"
    """What was spent before this run on the weights that it started from. The figures cover this
    run alone; where the earlier spending is not known, a device's ledger may have more."""
    client: ClientStatement | None = None
    """Guarantee of each client; None if clients are not protected."""
    evaluation: EvaluationStatement | None = None
    """Guarantee of the examples that clients hold back; None if they evaluated nothing, or without
    protection of examples."""
    cloud: CloudStatement | None = None
    """Guarantee of the cloud's examples; None if they are not protected."""


class Parity(_Part):
    """Comparison of the released file with the model that it was exported from."""

    max_abs_error: float
    """Largest difference of an output, over the golden inputs."""
    agreement: float
    """Share of equal decisions on the cloud's held-out data (see `fedcore.artifacts.parity`)."""
    metric: str
    metric_before: float
    metric_after: float
    """The primary metric on the cloud's held-out data, before and after compression."""


class TestStatement(_Part):
    """Results on the final test split, which no decision used."""

    __test__ = False  # tells pytest that this is no test class

    metric: str
    """Name of the primary metric."""
    examples: Annotated[int, Field(ge=1)]
    federated: float | None
    """Metric of the federated model, before fine-tuning and compression; None if not finite."""
    released: float | None
    """Metric of the released file; None if not finite."""
    drop: float | None = None
    """How much worse the released file is than the federated model, negative if it is better
    (an absolute accuracy; for an error, a fraction of it); None if one of them is not finite."""
    clients: int | None = None
    """Number of clients whose own test data were pooled; None if the server had test data."""


class NamedTensor(_Part):
    """One of several inputs of a model, without the batch dimension."""

    name: Annotated[str, Field(pattern=r"^[ -~]{1,64}$")]
    dtype: Literal[
        "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
    ]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(max_length=16)]


class NamedOutput(_Part):
    """One of several outputs of a model, without the batch dimension."""

    name: Annotated[str, Field(pattern=r"^[ -~]{1,64}$")]
    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**31)], ...], Field(max_length=16)]
    presentation: Presentation
    """How devices tell this answer."""
    labels: tuple[str, ...] = ()
    """Names of its classes; empty if they have none."""
    tolerance: Annotated[float, Field(gt=0)]
    """Largest absolute difference of a number of it that the self-test allows."""


class Manifest(_Part):
    """Signed description of one version of a released model.

    It contains no timings: they differ between devices, and signed data must not.

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
    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    """The kind of problem, which says what outputs mean."""
    presentation: Presentation | None = None
    """How devices tell an answer; None where the kind says it (see `presents`)."""
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    """Shape of one input, without the batch dimension."""
    input_dtype: str
    inputs: (
        Annotated[tuple[NamedTensor, ...], Field(min_length=1, max_length=MOST_INPUTS)] | None
    ) = None
    """What an input of shape ``(N,)`` holds, where a model has inputs with names: the numbers of
    each, in row-major order, one after the other. None for one input without a name."""
    outputs: (
        Annotated[tuple[NamedOutput, ...], Field(min_length=1, max_length=MOST_OUTPUTS)] | None
    ) = None
    """What an output of shape ``(N,)`` holds, where a model has outputs with names, likewise."""
    missing: MissingAllowed | None = None
    """Positions of an input, in row-major order, that may be NaN for a missing value, or ``all``;
    None if no number may be missing. Infinity never is an input."""
    onnx: FileEntry
    golden: FileEntry
    golden_tolerance: Annotated[float, Field(gt=0)]
    """Largest absolute difference of an output that the self-test allows."""
    lineage: Lineage
    privacy: PrivacyStatement
    parity: Parity
    test: TestStatement | None = None
    """Results on the final test split; None without a test."""

    @model_validator(mode="after")
    def _inputs_fill_the_vector(self) -> Manifest:
        if self.inputs is None:
            return self
        size = sum(math.prod(each.shape) for each in self.inputs)
        if self.input_shape != (size,):
            raise ValueError(f"inputs of {size} numbers for an input of shape {self.input_shape}")
        if len({each.name for each in self.inputs}) != len(self.inputs):
            raise ValueError("two inputs have one name")
        return self

    @model_validator(mode="after")
    def _outputs_differ(self) -> Manifest:
        names = [each.name for each in self.outputs or ()]
        if len(set(names)) != len(names):
            raise ValueError("two outputs have one name")
        return self

    def of_output(self, output: NamedOutput) -> Manifest:
        """Returns this manifest as if it were that of a model with one of its outputs."""
        return self.model_copy(
            update={
                "presentation": output.presentation,
                "labels": output.labels,
                "golden_tolerance": output.tolerance,
                "outputs": None,
            }
        )

    @property
    def presents(self) -> Presentation:
        """How devices tell an answer."""
        return self.presentation or presentation_of(self.kind)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Returns the manifest as canonical JSON: sorted keys, no optional white space."""
    values = manifest.model_dump(mode="json")
    # Devices of version 0.1 do not know these fields.
    if manifest.presentation is None:
        del values["presentation"]
    if manifest.lineage.initial_sha256 is None:
        del values["lineage"]["initial_sha256"]
    if manifest.privacy.before == "nothing":
        del values["privacy"]["before"]
    for name in ("evaluation", "cloud"):
        if values["privacy"][name] is None:
            del values["privacy"][name]
    for name in ("inputs", "outputs", "missing"):
        if values[name] is None:
            del values[name]
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def parse_manifest(raw: bytes) -> Manifest:
    """Parses the delivered bytes of a manifest.

    Raises:
        TrustError: the bytes are no manifest of this format.
    """
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise TrustError(
            f"manifest: {first_fault(error)}. The release was not installed; the previous "
            "version keeps serving."
        ) from None
