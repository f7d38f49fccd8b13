"""The compression candidates, each an object that builds one ONNX file from shared material."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedcore.config.run import CandidateName, RunConfig
from fedcore.errors import CompressionError
from fedcore.observability.words import counted
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, Task, size_of
from fedcore.training.batches import gather
from server.compression.distil import distil
from server.compression.export import OnnxExport, export_with_scopes
from server.compression.mixed import MixedModel, int8_mixed
from server.compression.prune import prune_and_recover
from server.compression.quantise import (
    Calibrated,
    calibrate,
    int8_dynamic,
    int8_static,
)
from server.compression.rounding import train_for_rounding
from server.compression.train_close import CloudTraining
from server.compression.weights_only import int4_weights, int8_weights


@dataclass(frozen=True, kw_only=True)
class Material:
    """Inputs that candidates are built from; shared intermediates are computed once, lazily."""

    run: RunConfig
    task: Task
    module: nn.Module
    """The trained full model, on the CPU, in evaluation mode."""
    examples: Examples | None
    """The cloud's training data."""
    reduce_range: bool
    """Limit int8 weights to 7 bits; see `server.compression.quantise.int8_static`."""
    progress: Callable[[str], None]
    """Callback at each step, with a line of text for the user."""
    untrained: str = ""
    """Why no candidate may be trained on the cloud's data; empty if it may."""

    @property
    def example_batch(self) -> Tensor:
        """A batch of two copies of the example input."""
        return torch.stack([self.task.example_input] * 2)

    @property
    def train(self) -> Examples:
        """The cloud's training data, for candidates that are built only if there is some."""
        assert self.examples is not None
        return self.examples

    @property
    def training(self) -> CloudTraining:
        """What candidates that are trained train with."""
        return CloudTraining(
            self.train, self.task.loss_of, self.task.problem, self.run.finetune, self.run.seed
        )

    @property
    def retrains(self) -> bool:
        """Whether pruned models are trained on the cloud's data."""
        return self.run.compression.prune_epochs > 0

    @cached_property
    def fp32(self) -> OnnxExport:
        """The trained model, exported."""
        return self._export(self.module)

    @cached_property
    def pruned(self) -> nn.Module:
        """The pruned model, retrained."""
        if self.retrains and self.untrained:
            raise CompressionError(
                f"it is trained on the cloud's data after pruning, and {self.untrained} "
                "(compression.prune_epochs = 0 prunes without training)"
            )
        compression = self.run.compression
        return prune_and_recover(
            self.module,
            self.example_batch,
            self.training,
            fraction=compression.prune_fraction,
            epochs=compression.prune_epochs,
        )

    @cached_property
    def trained_for_rounding(self) -> nn.Module:
        """The trained model, trained on with rounded weights and activations."""
        if self.untrained:
            raise CompressionError(f"it is trained on the cloud's data, and {self.untrained}")
        return train_for_rounding(
            self.module,
            self.example_batch,
            self.training,
            epochs=self.run.compression.rounding_epochs,
            reduce_range=self.reduce_range,
        )

    @cached_property
    def distilled(self) -> nn.Module:
        """The task's student, which has learnt the trained model's answers."""
        if self.task.student is None:
            raise CompressionError("the task has no student (a smaller network for it to train)")
        if self.untrained:
            raise CompressionError(f"it is trained on the cloud's data, and {self.untrained}")
        return distil(
            self.module,
            self.task.student,
            self.example_batch,
            self.training,
            epochs=self.run.compression.distil_epochs,
        )

    @cached_property
    def distilled_fp32(self) -> OnnxExport:
        """The student, exported."""
        return self._export(self.distilled)

    @cached_property
    def pruned_fp32(self) -> OnnxExport:
        """The pruned model, exported."""
        return self._export(self.pruned)

    @cached_property
    def calibration(self) -> Tensor:
        """Random inputs from the cloud's training data, limited to ``calibration_examples``."""
        order = torch.randperm(
            size_of(self.train), generator=torch_rng(self.run.seed, "calibration")
        )
        return gather(self.train, order[: self.run.compression.calibration_examples])[0]

    def saw_all(self, why: str) -> str:
        """Returns a text for the manifest: training used all training data."""
        return f"{counted(size_of(self.train), 'example')} of the cloud's training data, {why}"

    @property
    def saw_some(self) -> str:
        """Text for the manifest: the share of training data that calibration used."""
        return (
            f"{len(self.calibration)} of {counted(size_of(self.train), 'example')} of the cloud's "
            "training data, for ranges of activations"
        )

    def _export(self, module: nn.Module) -> OnnxExport:
        return export_with_scopes(
            module, self.example_batch, labels=self.task.labels, kind=self.task.problem.name
        )

    @cached_property
    def calibrated(self) -> Calibrated:
        """The trained model with the ranges of its activations."""
        return self._calibrate(self.fp32)

    @cached_property
    def pruned_calibrated(self) -> Calibrated:
        """The pruned model with the ranges of its activations."""
        return self._calibrate(self.pruned_fp32)

    @cached_property
    def rounding_calibrated(self) -> Calibrated:
        """The model that was trained with rounding, with the ranges of its activations."""
        return self._calibrate(self._export(self.trained_for_rounding))

    @cached_property
    def distilled_calibrated(self) -> Calibrated:
        """The student with the ranges of its activations."""
        return self._calibrate(self.distilled_fp32)

    def _calibrate(self, exported: OnnxExport) -> Calibrated:
        return calibrate(exported.onnx, self.calibration, preprocessing=exported.preprocessing)

    @cached_property
    def mixed(self) -> MixedModel:
        """The trained model with as many layers in 8 bits as keep its answers on calibration data.

        They have to agree twice as well as the limits ask for, as held-out data judge them again.
        """
        limits, kind = self.run.compression, self.task.problem
        return int8_mixed(
            self.calibrated,
            self.calibration.numpy(),
            agreement=kind.agreement,
            least_agreement=max(limits.min_agreement, 1 - limits.max_accuracy_drop / 2),
            reduce_range=self.reduce_range,
            time_limit_s=limits.time_limit_s,
            progress=self.progress,
        )


@dataclass(frozen=True, kw_only=True)
class Built:
    """A candidate's ONNX file, and the model that its outputs must match."""

    onnx: bytes
    reference: nn.Module
    """The torch model that it was exported from."""
    exact: bool
    """Whether the file may differ from its reference only by float rounding."""
    in_8_bits: bool = False
    """Whether it computes in 8 bits, which processors round differently."""
    calibration: str
    """Data that quantisation and pruning used, or ``none``."""
    fitted: bool = False
    """Whether its answers on the cloud's training data decided how it was built."""
    retrained: bool = False
    """Whether its weights were trained on the cloud's data."""


@dataclass(frozen=True)
class Candidate:
    """One way to make a model smaller or faster."""

    name: CandidateName
    build: Callable[[Material], Built]
    """Builds the ONNX file; raises `CompressionError` if the model doesn't support the
    technique."""


def _fp32(material: Material) -> Built:
    return Built(onnx=material.fp32.onnx, reference=material.module, exact=True, calibration="none")


def _int8_static(material: Material) -> Built:
    return _static(material, material.calibrated, material.module)


def _static(
    material: Material,
    calibrated: Calibrated,
    reference: nn.Module,
    *,
    learnt: str = "",
    retrained: bool = False,
) -> Built:
    """Builds the statically quantised file of a model; ``learnt``: from which data, if any."""
    return Built(
        onnx=int8_static(calibrated, reduce_range=material.reduce_range),
        reference=reference,
        exact=False,
        in_8_bits=True,
        calibration=f"{learnt}; {material.saw_some}" if learnt else material.saw_some,
        retrained=retrained,
    )


def _int8_dynamic(material: Material) -> Built:
    return Built(
        onnx=int8_dynamic(
            material.fp32.onnx,
            reduce_range=material.reduce_range,
            preprocessing=material.fp32.preprocessing,
        ),
        reference=material.module,
        exact=False,
        in_8_bits=True,
        calibration="none",
    )


def _int8_mixed(material: Material) -> Built:
    return Built(
        onnx=material.mixed.onnx,
        reference=material.module,
        exact=False,
        in_8_bits=True,
        fitted=True,
        calibration=(
            f"{material.saw_some}, and for the choice of {material.mixed.quantised} of "
            f"{counted(material.mixed.of, 'layer')}"
        ),
    )


def _int8_weights(material: Material) -> Built:
    return _weights_only(material, int8_weights)


def _int4_weights(material: Material) -> Built:
    return _weights_only(material, int4_weights)


def _weights_only(material: Material, quantise: Callable[..., bytes]) -> Built:
    return Built(
        onnx=quantise(material.fp32.onnx, preprocessing=material.fp32.preprocessing),
        reference=material.module,
        exact=False,
        calibration="none",
    )


def _pruned(material: Material) -> Built:
    return Built(
        onnx=material.pruned_fp32.onnx,
        reference=material.pruned,
        exact=True,
        calibration=material.saw_all("after pruning"),
        retrained=material.retrains,
    )


def _pruned_int8(material: Material) -> Built:
    return _static(
        material,
        material.pruned_calibrated,
        material.pruned,
        learnt=material.saw_all("after pruning"),
        retrained=material.retrains,
    )


def _int8_trained(material: Material) -> Built:
    return _static(
        material,
        material.rounding_calibrated,
        material.trained_for_rounding,
        learnt=material.saw_all("with rounding"),
        retrained=True,
    )


def _distilled(material: Material) -> Built:
    return Built(
        onnx=material.distilled_fp32.onnx,
        reference=material.distilled,
        exact=True,
        calibration=material.saw_all("for a student"),
        retrained=True,
    )


def _distilled_int8(material: Material) -> Built:
    return _static(
        material,
        material.distilled_calibrated,
        material.distilled,
        learnt=material.saw_all("for a student"),
        retrained=True,
    )


FP32 = Candidate("fp32", _fp32)
STATIC = Candidate("int8_static", _int8_static)
MIXED = Candidate("int8_mixed", _int8_mixed)
ALL: tuple[Candidate, ...] = (
    FP32,
    STATIC,
    Candidate("int8_dynamic", _int8_dynamic),
    MIXED,
    Candidate("int8_weights", _int8_weights),
    Candidate("int4_weights", _int4_weights),
    Candidate("pruned", _pruned),
    Candidate("pruned_int8", _pruned_int8),
    Candidate("int8_trained", _int8_trained),
    Candidate("distilled", _distilled),
    Candidate("distilled_int8", _distilled_int8),
)
"""All candidates, in the order of `fedcore.config.run.CANDIDATES`."""
