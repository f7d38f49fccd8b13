"""The draft of a release: the candidate that was chosen, and where it comes from."""

from __future__ import annotations

from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Lineage, TestStatement
from fedcore.task.definition import Task
from server.compression.compress import Compressed
from server.release.publish import Draft, Origin


def draft_of(
    model: str, task: Task, origin: Origin, compressed: Compressed, tested: TestStatement
) -> Draft:
    """What is to be signed.

    Args:
        model: The name that devices ask for.
        task: What the model is for.
        origin: The rounds that it comes from.
        compressed: Its candidates; the chosen one is released.
        tested: How that did on the final test split.
    """
    return Draft(
        model=model,
        onnx=compressed.files[compressed.chosen],
        golden=golden_bytes(compressed.golden_inputs, compressed.golden_outputs),
        kind=task.kind,
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
        ),
        privacy=origin.privacy,
        parity=compressed.parity,
        test=tested,
    )
