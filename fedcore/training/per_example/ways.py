"""Three ways to take each example's own gradient, from the quickest to the most general.

Each takes the gradient of a batch of one: the loss of one example behind preprocessing and model.
What a model or a loss does across a batch can therefore not couple examples. Each runs copies of
the modules, so that what these keep of one example (counters, running means, caches, in buffers or
in plain attributes) never meets the next one.
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
from fedcore.training.per_example.chain import Chain, Conv, Run, left_apart, like_weight, stacked
from fedcore.training.per_example.clipping import Gradient, example_gradients, norms, without
from fedcore.training.per_example.losses import example_losses
from fedcore.training.per_example.mapping import vmap

Name = Literal["chain", "vmap", "alone"]


@dataclass(frozen=True)
class Part:
    """Each example's own gradient over all trained parameters, for some examples."""

    squares: Tensor
    """Squared L2 norms, ``(B,)``."""
    usable: Tensor
    """Whether the norm is to be believed, ``(B,)``; see `ExampleGradients.usable`."""
    add: Callable[[Tensor, Sequence[Tensor]], None]
    """Adds all that are usable, each times its share ``(B,)``, to a total for each trained
    parameter. What is added is finite whatever the others are. At most `EXACT_ROWS` of them are
    summed up in float32."""


Kind = tuple[torch.Size, torch.dtype]
"""Of one input, without the batch dimension."""
Take = Callable[[nn.Module, nn.Module, Tensor, Tensor], Part]
"""From preprocessing, model, inputs ``(B, ...)`` and targets ``(B, ...)`` to their gradients."""


@dataclass(frozen=True)
class GradientMethod:
    """How per-example gradients of one model and loss are taken."""

    name: Name
    take: Take
    bytes_per_example: int
    """What one more example of a physical batch takes, beside its activations."""
    why: str = ""
    """What keeps a quicker way from being taken; empty for the quickest."""
    usual: Kind | None = None
    """That of the task's example, for which the way was found."""

    def rows(self, memory_bytes: int) -> int:
        """The physical batch: how many examples are taken at once within ``memory_bytes``."""
        if self.name == "alone":
            return 1
        return max(1, memory_bytes // max(1, self.bytes_per_example))


EXACT_ROWS = 32
"""Examples that are summed up in float32; their sums are added in float64. Where one example lifts
the sum of the others past a power of two, each of them may be rounded the other way: of so many
that is at most 3e-5 of the clip norm, below the margin that noise is drawn larger by."""


def exact_rows(count: int) -> Iterator[slice]:
    """Examples in parts that may be summed up in float32."""
    for start in range(0, count, EXACT_ROWS):
        yield slice(start, min(count, start + EXACT_ROWS))


def zero_totals(model: nn.Module) -> list[Tensor]:
    """A total for each trained parameter, in float64 where the device has it."""
    return [
        torch.zeros_like(one, dtype=_wide(one), requires_grad=False)
        for one in trained(model).values()
    ]


def _wide(one: Tensor) -> torch.dtype:
    return torch.float32 if one.device.type == "mps" else torch.float64


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, tied ones once, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fresh(*parts: Any) -> tuple[Any, ...]:
    """Copies of modules that share their parameters; whatever is no module is left as it is.

    Args:
        parts: Model, preprocessing and loss; what two of them share, their copies share.
    """
    modules = [part for part in parts if isinstance(part, nn.Module)]
    shared = {id(p): p for module in modules for p in module.parameters()}
    copies = iter(copy.deepcopy(modules, shared))
    return tuple(next(copies) if isinstance(part, nn.Module) else part for part in parts)


def by_chain(chain: Chain, run: Run, loss: Loss) -> GradientMethod:
    """For chains of dense layers and convolutions: products of what went in and came back.

    No gradient of a dense layer is ever made, and one pass back serves the whole batch.

    Args:
        chain: Of the whole model, all of it trained.
        run: Runs it, and leaves examples apart.
        loss: Mean loss over a batch, called on batches of one.

    Source:
        Goodfellow 2015, arXiv:1510.01799; Bu et al. 2023, arXiv:2210.00038.
    """

    def take(preprocess: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor) -> Part:
        weights = stacked(chain, {name: p.detach() for name, p in trained(model).items()}, 1)
        output, back = run(weights, each_alone(preprocess, inputs, mapped=True).unsqueeze(0))
        _, slopes = example_losses(fresh(loss)[0], output, targets.unsqueeze(0))
        given = [left_apart(part) for part in back(slopes)]
        biases = [layer.bias is not None for layer in chain.layers]
        parts = [example_gradients(one, bias=b) for one, b in zip(given, biases, strict=True)]
        usable = torch.stack([part.usable[0] for part in parts]).all(dim=0)
        if not bool(usable.all()):
            given = [without(one, usable) for one in given]
            parts = [example_gradients(one, bias=b) for one, b in zip(given, biases, strict=True)]

        def add(share: Tensor, totals: Sequence[Tensor]) -> None:
            named = dict(zip(weights, totals, strict=True))
            for some in exact_rows(len(share)):
                for layer, part in zip(chain.layers, parts, strict=True):
                    found: Gradient = part.weighted(share.unsqueeze(0), some)
                    product = torch.bmm(found.left.transpose(1, 2), found.right)
                    named[layer.weight] += like_weight(layer, product, weights[layer.weight])[0]
                    if layer.bias is not None:
                        named[layer.bias] += found.bias[0]

        squares = torch.stack([part.squares[0] for part in parts]).sum(dim=0)
        return Part(squares, usable, add)

    convolved = sum(
        layer.window.kernel[0] * layer.window.kernel[1] * layer.channels * layer.outs
        for layer in chain.layers
        if isinstance(layer, Conv)
    )
    return GradientMethod("chain", take, 4 * (convolved + 8 * chain.numbers))


def by_vmap(parameters: int, loss: Loss, *, why: str) -> GradientMethod:
    """For whatever torch can vectorise: the gradient of a batch of one, mapped over examples.

    Args:
        parameters: How many numbers are trained.
        loss: Mean loss over a batch, called on batches of one.
        why: What keeps the model from being a chain.
    """

    def take(preprocess: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor) -> Part:
        values = {name: p.detach() for name, p in trained(model).items()}
        before, network, judge = fresh(preprocess, model, loss)

        def alone(values: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                behind = before(one.unsqueeze(0))
            output = functional_call(network, values, (behind,))
            return cast(Tensor, judge(output, target.unsqueeze(0)))

        mapped = vmap(grad(alone), in_dims=(None, 0, 0), randomness="different")
        with own_states(network):
            return of_gradients(list(mapped(values, inputs, targets).values()))

    return GradientMethod("vmap", take, 12 * parameters, why)  # a gradient, and what it is made of


@contextmanager
def own_states(model: nn.Module) -> Iterator[None]:
    """Gives recurrent layers an initial state for each example: theirs is one for all of vmap's."""

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
    """For every model that takes a batch of one: an ordinary backward pass for each example."""

    def take(preprocess: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor) -> Part:
        parameters = trained(model).values()
        each = [parameter.new_zeros(len(inputs), *parameter.shape) for parameter in parameters]
        for place, (one, target) in enumerate(zip(inputs, targets, strict=True)):
            # Parameters, too: a model that overwrites its own must not move those of the others.
            before, network, judge = copy.deepcopy((preprocess, model, loss))
            found = own_gradient(before, network, judge, one, target)
            for gradients, gradient in zip(each, found, strict=True):
                gradients[place] = gradient
        return of_gradients(each)

    return GradientMethod("alone", take, 0, why)


def own_gradient(
    preprocess: nn.Module, model: nn.Module, loss: Loss, one: Tensor, target: Tensor
) -> list[Tensor]:
    """The gradient of a batch of one for each trained parameter; runs the modules themselves."""
    parameters = list(trained(model).values())
    with torch.no_grad():
        behind = preprocess(one.unsqueeze(0))
    _clear(model)  # a backward pass would add to the step's before
    try:
        with torch.enable_grad():  # not autograd.grad, which reentrant checkpoints do not bear
            torch.autograd.backward(loss(model(behind), target.unsqueeze(0)))
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense()
            for p in parameters
        ]
    finally:
        _clear(model)


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def of_gradients(each: Sequence[Tensor]) -> Part:
    """From gradients as they are, ``(B, ...)`` for each parameter."""
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

    return Part(squares, usable, add)


def where(usable: Tensor, rows: Tensor) -> Tensor:
    """Rows ``(B, ...)``, with zeros in place of those that are not usable."""
    return torch.where(usable.view(-1, *[1] * (rows.dim() - 1)), rows, torch.zeros_like(rows))


def _exact(one: Tensor) -> Tensor:
    """Numbers of 16 bits in 32, in which norms and sums are what they are to be."""
    return one.float() if one.dtype in (torch.float16, torch.bfloat16) else one


def each_alone(preprocess: nn.Module, inputs: Tensor, *, mapped: bool) -> Tensor:
    """Inputs behind preprocessing, each run through it as a batch of one.

    Args:
        preprocess: Not trained.
        inputs: ``(B, ...)``.
        mapped: Whether torch's vmap takes it, from `is_mappable`. Decided beforehand: what one
            example does must not change how the others are rounded.
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
    """Whether torch's vmap takes a preprocessing, tried on made-up inputs ``(B, ...)``."""
    try:
        each_alone(preprocess, inputs, mapped=True)
    except Exception:  # the task's code, run as it is run nowhere else
        return False
    return True
