"""Chooses a model's per-example gradient method by trying it on synthetic examples.

Synthetic, because a refusal that depended on real examples would reveal something about them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedcore.errors import PrivacyError, UnsupportedLayer
from fedcore.privacy.layers import check_layers
from fedcore.seeds import drawn_outside_torch, global_streams
from fedcore.task.definition import Task
from fedcore.task.kinds.protocol import Kind, Loss
from fedcore.task.model import FullModel
from fedcore.training.dropout import WithoutDropout
from fedcore.training.per_example.chain import torch_run
from fedcore.training.per_example.gradient_methods import (
    GradientMethod,
    chain_method,
    fresh,
    is_mappable,
    one_by_one,
    own_gradient,
    preprocess_each,
    trainable_parameters,
    vmap_method,
    zero_totals,
)
from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.lookups import lookup_method
from fedcore.training.per_example.losses import is_mean
from fedcore.training.per_example.runs import compiled_run

_EXAMPLES = 8
_FIXED_DRAWS = (
    "aten::bernoulli",
    "aten::native_dropout",
    "aten::_fused_dropout",
    "aten::_scaled_dot_product",
    "aten::_cudnn_rnn",
)
"""Name prefixes of dropout operations, which draw one number per element, whatever its value."""
_SAME = 1e-4  # relative; reordered float32 sums differ by about 1e-6


@dataclass(frozen=True)
class SyntheticExamples:
    """Synthetic examples with the shapes and dtypes of a task's."""

    inputs: Tensor
    """Shape ``(B, *example_input.shape)``."""
    targets: Tensor | None
    """Targets that the loss accepts; None where none of the usual kinds fits."""


def choose_method(task: Task, model: FullModel) -> GradientMethod:
    """Returns the fastest method that matches the gradients of batches of one for a task's model.

    Args:
        task: Provides loss, kind and example input; its data are not read.
        model: A fresh model, on the device to train on; only copies of it run.

    Raises:
        UnsupportedLayer: The model's output for an example depends on other examples of the batch
            or on earlier ones, running it changes its buffers, or it rejects batches of one.
        PrivacyError: The loss is not a mean over examples.
    """
    check_layers(model.preprocess)
    check_layers(model.model)
    with warnings.catch_warnings():  # about synthetic examples; training warns about real ones
        warnings.simplefilter("ignore", UserWarning)
        return _chosen(task, task.loss_of, model)


def _chosen(task: Task, loss: Loss, model: FullModel) -> GradientMethod:
    given, model = model, _copied(model, loss)
    sample = synthetic_examples(task, model)
    with _deterministic(model):
        _check_apart(model.preprocess, sample.inputs, "preprocess")
        mapped = is_mappable(model.preprocess, sample.inputs)
        preprocessed = preprocess_each(model.preprocess, sample.inputs, mapped=mapped)
        _check_apart(model.model, preprocessed, "model")
    _check_unchanged(given, model.train(), sample)
    (model,) = fresh(given)  # from here on a copy that shares the parameters
    model.train()
    for part, inputs, what in (
        (model.preprocess, sample.inputs, "preprocess"),
        (model.model, preprocessed, "model"),
    ):
        if _repeats(part, inputs):  # random outputs can't be compared
            _check_apart(part, inputs, what)
    if sample.targets is not None:
        _check_mean(loss, model, sample, task.problem)
        _check_stateless(loss, model, sample)
    method = _fastest(loss, model, preprocessed, sample, mapped=mapped)
    example = task.example_input
    return replace(method, usual=(example.shape, example.dtype))


def _fastest(
    loss: Loss, model: FullModel, preprocessed: Tensor, sample: SyntheticExamples, *, mapped: bool
) -> GradientMethod:
    parameters = trainable_parameters(model.model)
    alone = one_by_one(loss, why="")
    if sample.targets is None:
        return one_by_one(loss, why="the loss accepts none of the targets that were tried")
    if not mapped:
        return one_by_one(loss, why="torch cannot map the preprocessing over examples")
    drawn = [name for name in _drawn(loss, model, sample) if not name.startswith(_FIXED_DRAWS)]
    if drawn:  # the count may depend on one example and shift the next one's numbers, and draws
        # outside torch are shared by all examples of a vectorised pass
        return one_by_one(loss, why=f"it draws random numbers with {', '.join(drawn)}")
    why = "the model is not a chain of layers that it knows"
    if len(parameters) < len(list(model.model.parameters())):
        why = "some parameters are frozen"
    elif not _has_hooks(model.model):
        (network,) = fresh(model.model)  # tracing leaves proxies in attributes
        chain = find_chain(network, preprocessed)
        if chain is not None:
            run = compiled_run(chain, network, per_example=True) or torch_run(chain)
            method = chain_method(chain, run, loss)
            if not _difference(method, alone, model, sample):
                return method
    lookups = lookup_method(model.model, preprocessed, loss, why=why)
    if lookups is not None and not _difference(lookups, alone, model, sample):
        return lookups
    method = vmap_method(sum(p.numel() for p in parameters.values()), loss, why=why)
    problem = _difference(method, alone, model, sample)
    return one_by_one(loss, why=problem) if problem else method


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which operations draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def _drawn(loss: Loss, model: FullModel, sample: SyntheticExamples) -> set[str]:
    """Returns the names of the random sources that training on one example draws from."""
    assert sample.targets is not None
    model.train()
    before, network, judge = fresh(model.preprocess, model.model, loss)
    draws, began = _Draws(), drawn_outside_torch()
    with draws:
        own_gradient(before, network, judge, sample.inputs[0], sample.targets[0])
    outside = {"Python's or NumPy's random"} if drawn_outside_torch() != began else set()
    return draws.names | outside


def _difference(
    method: GradientMethod, alone: GradientMethod, model: FullModel, sample: SyntheticExamples
) -> str:
    """Returns why a method does not match batches of one; empty if it does."""
    assert sample.targets is not None
    share = torch.linspace(0.5, 1, len(sample.inputs), device=sample.inputs.device)
    examples = (model.preprocess, model.model, sample.inputs, sample.targets)
    try:
        model.train()
        method.compute(*examples)  # with dropout
        # A chain drops values in evaluation, too.
        undropped = WithoutDropout() if method.name == "chain" else nullcontext()
        with _deterministic(model), undropped:
            found, right = method.compute(*examples), alone.compute(*examples)
            sums = [zero_totals(model.model) for _ in range(2)]
            found.add(share, sums[0])
            right.add(share, sums[1])
    except Exception as error:  # the task's code, run in an unusual way
        said = str(error).partition("\n")[0][:120]
        return f"torch cannot compute all gradients at once ({type(error).__name__}: {said})"
    largest = max(map(_largest, sums[1]), default=0.0)
    if all(_close(one, other, largest) for one, other in zip(*sums, strict=True)):
        return ""
    return "gradients computed at once differ from those of batches of one"


def _close(one: Tensor, other: Tensor, largest: float = 0.0) -> bool:
    """Returns whether two outputs, or gradients of a parameter, are equal up to rounding.

    Args:
        one: A tensor.
        other: The other one.
        largest: Largest value in the gradients of all parameters. What a normalisation behind it
            cancels, such as a bias, has a gradient of rounding errors of others alone.
    """
    allowed = _SAME * _largest(other) + 1e-6 * largest + 1e-30
    return torch.allclose(one, other, rtol=_SAME, atol=allowed, equal_nan=True)


def _largest(gradient: Tensor) -> float:
    finite = gradient[torch.isfinite(gradient)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def synthetic_examples(task: Task, model: FullModel, count: int = _EXAMPLES) -> SyntheticExamples:
    """Returns random examples, from a fixed seed, in the shape and dtype of the task's."""
    rng = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device
    inputs = _inputs(task.example_input, model.model, count, rng).to(device)
    try:
        with torch.no_grad(), _deterministic(model):
            outputs = model(inputs)
    except Exception:  # the model rejects random inputs: use the task's example
        inputs = torch.stack([task.example_input] * count).to(device)
        with torch.no_grad(), _deterministic(model):
            outputs = model(inputs)
    drawn = (one.to(device) for one in task.problem.synthetic(outputs, rng))
    fitting = (one for one in drawn if _accepts(task.loss_of, outputs, one))
    return SyntheticExamples(inputs, next(fitting, None))


def _accepts(loss: Loss, outputs: Tensor, targets: Tensor) -> bool:
    """Returns whether a loss accepts these targets, for a batch and for a batch of one."""
    try:
        with torch.no_grad():
            values = loss(outputs, targets), loss(outputs[:1], targets[:1])
    except Exception:  # the loss expects other targets
        return False
    return all(value.ndim == 0 for value in values) and bool(torch.isfinite(values[0]))


def _inputs(example: Tensor, model: nn.Module, count: int, rng: torch.Generator) -> Tensor:
    shape = (count, *example.shape)
    if example.is_floating_point():
        return torch.randn(shape, generator=rng).to(example.dtype)
    if example.dtype == torch.bool:
        return torch.rand(shape, generator=rng) < 0.5
    tables = [one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding)]
    most = min(tables, default=int(example.max()) + 1 if example.numel() else 1)
    return torch.randint(max(1, min(most, 2**31)), shape, generator=rng).to(example.dtype)


def _copied(model: FullModel, loss: Loss) -> FullModel:
    """Returns a copy; refuses objects that can't be copied, as each example needs fresh copies."""
    try:
        copied, _ = copy.deepcopy((model, loss))
    except Exception as error:  # the task's objects may raise anything
        raise UnsupportedLayer(
            "model: example-level privacy runs each example on a copy of preprocessing, model "
            f"and loss, and copying fails: {type(error).__name__}: {str(error)[:200]}. Nothing "
            "was trained or charged; remove from them what copy.deepcopy refuses (open files, "
            "locks, tensors that are part of a graph), or set privacy.unit to 'none'."
        ) from None
    return copied


def _check_apart(module: nn.Module, inputs: Tensor, what: str) -> None:
    """Refuses a module whose output for one example depends on others, in its current mode."""
    with torch.no_grad():
        alone = torch.cat([_of_one(fresh(module)[0], one, what) for one in inputs])
        together = fresh(module)[0](inputs)
    if together.shape != alone.shape or not _close(together.float(), alone.float()):
        raise UnsupportedLayer(
            f"{what}: its output for an example depends on the other examples of the batch, so a "
            "model trained on each example alone would differ from the one that is served. "
            "Nothing was trained or charged; use layers that treat each example alone (GroupNorm "
            "or LayerNorm in place of statistics over the batch, batch_first=True for attention "
            "and recurrent layers), or set privacy.unit to 'none'."
        )


def _of_one(module: nn.Module, one: Tensor, what: str) -> Tensor:
    """Returns a module's output for a batch of one; refuses a module that fails on it."""
    try:
        found: Tensor = module(one.unsqueeze(0))
    except Exception as error:
        mode = "in training mode " if module.training else ""
        raise UnsupportedLayer(
            f"{what}: example-level privacy trains on each example alone, and {mode}a batch of one "
            f"fails: {type(error).__name__}: {str(error)[:200]}. Nothing was trained or "
            f"charged; make {what} take a batch of one, or set privacy.unit to 'none'."
        ) from None
    return found


def _repeats(module: nn.Module, inputs: Tensor) -> bool:
    """Returns whether two seeds give the same output; by coincidence, random outputs may agree."""
    given, outside = [], False
    for seed in (1, 2):
        with torch.no_grad(), global_streams(seed):
            began = drawn_outside_torch()
            given.append(fresh(module)[0](inputs))
            outside |= drawn_outside_torch() != began
    return not outside and torch.equal(*given)


def _check_stateless(loss: Loss, model: FullModel, sample: SyntheticExamples) -> None:
    """Refuses a model or loss that carries state from one example to the next in training.

    Fresh copies for each example would hide such state, and train another model than the task's.
    """
    assert sample.targets is not None
    pairs = list(zip(sample.inputs, sample.targets, strict=True))
    found = []
    for order in (pairs[:1], [*pairs[1:], pairs[0]]):
        before, network, judge = fresh(model.preprocess, model.model, loss)
        for one, target in order:
            try:
                with global_streams(1):
                    gradient = own_gradient(before, network, judge, one, target)
            except Exception as error:
                raise UnsupportedLayer(
                    "model: example-level privacy computes the gradient of each example alone, "
                    f"and that fails: {type(error).__name__}: {str(error)[:200]}. Nothing was "
                    "trained or charged; make model and loss take batches of one in training, or "
                    "set privacy.unit to 'none'."
                ) from None
        found.append(gradient)
    scale = max((float(one.abs().max()) for one in found[0] if one.numel()), default=0.0)
    for first, again in zip(*found, strict=True):
        if not torch.allclose(first, again, rtol=0, atol=1e-6 * scale, equal_nan=True):
            raise UnsupportedLayer(
                "model: its gradient for an example depends on the examples processed before: "
                "model, preprocessing or loss keep state from them, or draw from their own "
                "random generator. Nothing was trained or charged; keep no counters, running "
                "means or lists from one example to the next, and draw from torch's default "
                "generator, or set privacy.unit to 'none'."
            )


def _check_unchanged(given: FullModel, copied: FullModel, sample: SyntheticExamples) -> None:
    """Refuses a model that changes its parameters or buffers when run; runs only the copy."""
    with torch.no_grad():
        for one in sample.inputs:
            _of_one(copied.model, _of_one(copied.preprocess, one, "preprocess")[0], "model")
    now = dict(_state(copied))
    moved = [name.partition(".")[2] for name, one in _state(given) if not _is_equal(one, now[name])]
    if moved:
        raise UnsupportedLayer(
            f"model: running it changes {', '.join(moved)}, without a training step. It may hold "
            "statistics of the data, and would leave the device without noise. Nothing was "
            "trained or charged; use layers without such state, or set privacy.unit to 'none'."
        )


def _state(model: FullModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))  # NaN equals NaN


def _check_mean(loss: Loss, model: FullModel, sample: SyntheticExamples, kind: Kind) -> None:
    assert sample.targets is not None
    with torch.no_grad(), _deterministic(model):
        outputs = model(sample.inputs)
    # Add an outlier: over similar examples, a root or ratio over the batch resembles a mean.
    sample.targets.copy_(kind.outlier(sample.targets))
    try:
        mean = is_mean(loss, outputs, sample.targets)
    except Exception:  # it rejects a batch of one
        mean = False
    if mean is False:
        raise PrivacyError(
            "loss: over a batch it is not the mean of the losses of batches of one. "
            "Example-level privacy computes each example alone, so this would train for another "
            "objective. Nothing was trained or charged; for class weights or ignored targets leave "
            "`loss` out and set class_weights or ignore_index of the task. In a loss of your own "
            "divide by the number of examples: instead of CrossEntropyLoss(weight=w) use "
            "(w[target] * cross_entropy(output, target, reduction='none')).mean(); for masked "
            "targets divide by a fixed length, or by each example's own; use the mean itself "
            "instead of its root, and no terms between examples; or set privacy.unit to 'none'."
        )


def _has_hooks(model: nn.Module) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@contextmanager
def _deterministic(module: nn.Module) -> Iterator[None]:
    """Switches to evaluation mode, in which dropout and similar layers draw nothing."""
    modes = {name: one.training for name, one in module.named_modules()}
    module.eval()
    try:
        yield
    finally:
        for name, one in module.named_modules():
            one.training = modes[name]
