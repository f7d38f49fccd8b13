"""Assembly of a release draft from the chosen candidate and its provenance."""

from __future__ import annotations

from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Lineage, TestStatement
from fedcore.artifacts.presentation import presentation_of
from fedcore.task.definition import Task
from server.compression.compressed import Compressed
from server.release.draft import Draft, Origin
from server.release.named import named_outputs, named_tensors


def draft_of(
    model: str, task: Task, origin: Origin, compressed: Compressed, tested: TestStatement | None
) -> Draft:
    """Assembles the content of a release for signing.

    Args:
        model: The name under which devices request the model.
        task: The model's task.
        origin: Provenance and privacy of the federated rounds.
        compressed: The candidates; the chosen one is released.
        tested: The chosen candidate's result on the final test split; None without one.

    Raises:
        TaskError: a manifest cannot describe the task's named inputs.
    """
    golden = compressed.golden
    kind = task.problem
    return Draft(
        model=model,
        onnx=compressed.files[compressed.chosen],
        golden=golden_bytes(golden.inputs, golden.outputs, golden.places, golden.reference),
        kind=kind.name,
        presentation=None if presentation_of(kind.name) == kind.presentation else kind.presentation,
        missing=compressed.missing,
        inputs=named_tensors(task.named_inputs, task=task.name),
        outputs=named_outputs(kind, golden, compressed.golden_tolerance, task=task.name),
        labels=task.labels,
        input_shape=tuple(task.example_input.shape),
        input_dtype=str(task.example_input.dtype).removeprefix("torch."),
        golden_tolerance=compressed.golden_tolerance,
        lineage=Lineage(
            run=origin.run,
            round=origin.round,
            parent_sha256=origin.parent_sha256,
            finetuned=compressed.source_sha256 != origin.parent_sha256,
            candidate=compressed.chosen,
            config_sha256=origin.config_sha256,
            seed=origin.seed,
            calibration=compressed.calibration,
            initial_sha256=origin.initial_sha256,
        ),
        privacy=origin.privacy,
        parity=compressed.parity,
        test=tested,
    )
