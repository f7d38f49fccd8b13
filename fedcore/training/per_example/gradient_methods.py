"""Methods for per-example gradients: by a chain of layers (fastest), by vmap, and one by one.

Each method computes the gradient of a batch of one: the loss of a single example after
preprocessing and model. Operations across the batch therefore cannot couple examples. Each method
runs copies of the modules, so that state which these keep of one example (counters, running means,
caches, in buffers or plain attributes) never reaches the next example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedcore.task.definition import Loss
from fedcore.training.per_example.chain import (
    Chain,
    Conv,
    Run,
    per_example_part,
    reshape_to_weight,
    stacked,
)
from fedcore.training.per_example.clipping import Gradient, example_gradients, norms, zero_unusable
from fedcore.training.per_example.losses import example_losses
from fedcore.training.per_example.mapping import vmap

Name = Literal["chain", "vmap", "alone"]


@dataclass(frozen=True)
class GradientPart:
    """Per-example gradients over all trained parameters, for a group of examples."""

    squares: Tensor
    """Squared L2 norms, ``(B,)``."""
    usable: Tensor
    """Whether the norm is reliable, ``(B,)``; see `ExampleGradients.usable`."""
    add: Callable[[Tensor, Sequence[Tensor]], None]
    """Adds the usable gradients, each times its scale factor ``(B,)``, to one total per trained
    parameter. The added values are finite even if other gradients are not. At most `EXACT_ROWS`
    gradients are summed in float32."""


Kind = tuple[torch.Size, torch.dtype]
"""Shape and dtype of one input, without the batch dimension."""
Compute = Callable[[nn.Module, nn.Module, Tensor, Tensor], GradientPart]
"""Maps preprocessing, model, inputs ``(B, ...)`` and targets ``(B, ...)`` to their gradients."""


@dataclass(frozen=True)
class GradientMethod:
    """A method to compute per-example gradients of one model and loss."""

    name: Name
    compute: Compute
    bytes_per_example: int
    """Additional memory for each example of a physical batch, without activations."""
    why: str = ""
    """Why no faster method applies; empty for the fastest."""
    usual: Kind | None = None
    """Shape and dtype of the task's example input, for which the method was chosen."""

    def rows(self, memory_bytes: int) -> int:
        """Returns the physical batch size: how many examples fit into ``memory_bytes`` at once."""
        if self.name == "alone":
            return 1
        return max(1, memory_bytes // max(1, self.bytes_per_example))


EXACT_ROWS = 32
"""Examples summed in float32; such partial sums are added in float64. An example that lifts the sum
past a power of two can flip the rounding of every other one: over this many examples that is at
most 3e-5 of the clip norm, which the noise margin covers."""


def exact_rows(count: int) -> Iterator[slice]:
    """Yields slices of examples, each small enough to be summed in float32."""
    for start in range(0, count, EXACT_ROWS):
        yield slice(start, min(count, start + EXACT_ROWS))


def zero_totals(model: nn.Module) -> list[Tensor]:
    """Returns a zero total for each trained parameter, in float64 where the device supports it."""
    return [
        torch.zeros_like(one, dtype=_wide(one), requires_grad=False)
        for one in trainable_parameters(model).values()
    ]


def _wide(one: Tensor) -> torch.dtype:
    return torch.float32 if one.device.type == "mps" else torch.float64


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by name; tied parameters appear once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fresh(*parts: Any) -> tuple[Any, ...]:
    """Returns copies of modules that share the originals' parameters; other objects are not copied.

    Args:
        parts: Model, preprocessing and loss; what the originals share, the copies share, too.
    """
    modules = [part for part in parts if isinstance(part, nn.Module)]
    shared = {id(p): p for module in modules for p in module.parameters()}
    copies = iter(copy.deepcopy(modules, shared))
    return tuple(next(copies) if isinstance(part, nn.Module) else part for part in parts)


def chain_method(chain: Chain, run: Run, loss: Loss) -> GradientMethod:
    """Returns the method for chains of dense and convolutional layers.

    It multiplies layer inputs with output gradients: no dense layer's per-example gradient is
    materialised, and one backward pass serves the whole batch.

    Args:
        chain: The chain of the whole model, all of whose parameters are trained.
        run: Runs the chain and keeps examples separate.
        loss: Mean loss over a batch, called on batches of one.

    Source:
        Goodfellow 2015, arXiv:1510.01799; Bu et al. 2023, arXiv:2210.00038.
    """

    def compute(
        preprocess: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor
    ) -> GradientPart:
        weights = stacked(
            chain, {name: p.detach() for name, p in trainable_parameters(model).items()}, 1
        )
        output, backward = run(
            weights, preprocess_each(preprocess, inputs, mapped=True).unsqueeze(0)
        )
        _, grads = example_losses(fresh(loss)[0], output, targets.unsqueeze(0))
        given = [per_example_part(part) for part in backward(grads)]
        biases = [layer.bias is not None for layer in chain.layers]
        parts = [example_gradients(one, bias=b) for one, b in zip(given, biases, strict=True)]
        usable = torch.stack([part.usable[0] for part in parts]).all(dim=0)
        if not bool(usable.all()):
            given = [zero_unusable(one, usable) for one in given]
            parts = [example_gradients(one, bias=b) for one, b in zip(given, biases, strict=True)]

        def add(share: Tensor, totals: Sequence[Tensor]) -> None:
            named = dict(zip(weights, totals, strict=True))
            for some in exact_rows(len(share)):
                for layer, part in zip(chain.layers, parts, strict=True):
                    found: Gradient = part.weighted(share.unsqueeze(0), some)
                    product = torch.bmm(found.left.transpose(1, 2), found.right)
                    named[layer.weight] += reshape_to_weight(layer, product, weights[layer.weight])[
                        0
                    ]
                    if layer.bias is not None:
                        named[layer.bias] += found.bias[0]

        squares = torch.stack([part.squares[0] for part in parts]).sum(dim=0)
        return GradientPart(squares, usable, add)

    convolved = sum(
        layer.window.kernel[0] * layer.window.kernel[1] * layer.channels * layer.outs
        for layer in chain.layers
        if isinstance(layer, Conv)
    )
    return GradientMethod("chain", compute, 4 * (convolved + 8 * chain.numbers))


def vmap_method(parameters: int, loss: Loss, *, why: str) -> GradientMethod:
    """Returns the method for models that torch can vectorise: a batch-of-one gradient under vmap.

    Args:
        parameters: Number of trained values.
        loss: Mean loss over a batch, called on batches of one.
        why: Why the model is not a chain.
    """

    def compute(
        preprocess: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor
    ) -> GradientPart:
        values = {name: p.detach() for name, p in trainable_parameters(model).items()}
        before, network, judge = fresh(preprocess, model, loss)

        def alone(values: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                preprocessed = before(one.unsqueeze(0))
            output = functional_call(network, values, (preprocessed,))
            return cast(Tensor, judge(output, target.unsqueeze(0)))

        mapped = vmap(grad(alone), in_dims=(None, 0, 0), randomness="different")
        with own_states(network):
            return of_gradients(list(mapped(values, inputs, targets).values()))

    return GradientMethod("vmap", compute, 12 * parameters, why)  # a gradient and its intermediates


@contextmanager
def own_states(model: nn.Module) -> Iterator[None]:
    """Gives recurrent layers an initial state per example, in place of one for the whole vmap."""

    def give(layer: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = len(args) > 1 or kwargs.get("hx") is not None
        if given or layer.mode == "LSTM" or not isinstance(args[0], Tensor):
            return None
        batch = () if args[0].dim() == 2 else (args[0].shape[0 if layer.batch_first else 1],)
        states = layer.num_layers * (2 if layer.bidirectional else 1)
        return args, {**kwargs, "hx": args[0].new_zeros(states, *batch, layer.hidden_size)}

    hooks = [
        layer.register_forward_pre_hook(give, with_kwargs=True)
        for layer in model.modules()
        if isinstance(layer, nn.RNNBase)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def one_by_one(loss: Loss, *, why: str) -> GradientMethod:
    """Returns the method for any model that accepts a batch of one: a backward pass per example."""

    def compute(
        preprocess: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor
    ) -> GradientPart:
        parameters = trainable_parameters(model).values()
        each = [parameter.new_zeros(len(inputs), *parameter.shape) for parameter in parameters]
        for place, (one, target) in enumerate(zip(inputs, targets, strict=True)):
            # Copies parameters, too: one example must not see another's overwrite of them.
            before, network, judge = copy.deepcopy((preprocess, model, loss))
            found = own_gradient(before, network, judge, one, target)
            for gradients, gradient in zip(each, found, strict=True):
                gradients[place] = gradient
        return of_gradients(each)

    return GradientMethod("alone", compute, 0, why)


def own_gradient(
    preprocess: nn.Module, model: nn.Module, loss: Loss, one: Tensor, target: Tensor
) -> list[Tensor]:
    """Returns a batch of one's gradient per trained parameter; runs the modules, not copies."""
    parameters = list(trainable_parameters(model).values())
    with torch.no_grad():
        preprocessed = preprocess(one.unsqueeze(0))
    _clear(model)  # a backward pass would add to the previous step's
    try:
        with torch.enable_grad():  # reentrant checkpoints reject autograd.grad
            torch.autograd.backward(loss(model(preprocessed), target.unsqueeze(0)))
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense()
            for p in parameters
        ]
    finally:
        _clear(model)


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def of_gradients(each: Sequence[Tensor]) -> GradientPart:
    """Returns the `GradientPart` for materialised gradients, ``(B, ...)`` for each parameter."""
    flat = [_exact(one.detach().flatten(1)) for one in each]
    squares = torch.stack([norms(one) for one in flat]).square().sum(dim=0)
    usable = torch.isfinite(squares)
    if not bool(usable.all()):
        flat = [where(usable, one) for one in flat]

    def add(share: Tensor, totals: Sequence[Tensor]) -> None:
        for some in exact_rows(len(share)):
            for one, total in zip(flat, totals, strict=True):
                found = torch.mv(one[some].transpose(0, 1), share[some].to(one.dtype))
                total += found.view(total.shape)

    return GradientPart(squares, usable, add)


def where(usable: Tensor, rows: Tensor) -> Tensor:
    """Returns rows ``(B, ...)`` with zeros in place of those that are not usable."""
    return torch.where(usable.view(-1, *[1] * (rows.dim() - 1)), rows, torch.zeros_like(rows))


def _exact(one: Tensor) -> Tensor:
    """Returns 16-bit floats as float32, for accurate norms and sums."""
    return one.float() if one.dtype in (torch.float16, torch.bfloat16) else one


def preprocess_each(preprocess: nn.Module, inputs: Tensor, *, mapped: bool) -> Tensor:
    """Returns preprocessed inputs, each run through preprocessing as a batch of one.

    Args:
        preprocess: Not trained.
        inputs: Shape ``(B, ...)``.
        mapped: Whether to use torch's vmap, from `is_mappable`. Decided beforehand: one example
            must not change the rounding of the others.
    """
    if type(preprocess) is nn.Identity:
        return inputs
    with torch.no_grad():
        if mapped:
            (before,) = fresh(preprocess)
            alone = vmap(lambda one: before(one.unsqueeze(0)).squeeze(0), randomness="different")
            return cast(Tensor, alone(inputs))
        return torch.cat([fresh(preprocess)[0](one.unsqueeze(0)) for one in inputs])


def is_mappable(preprocess: nn.Module, inputs: Tensor) -> bool:
    """Returns whether torch's vmap accepts a preprocessing, tried on inputs ``(B, ...)``."""
    try:
        preprocess_each(preprocess, inputs, mapped=True)
    except Exception:  # the task's code, run in an unusual way
        return False
    return True
