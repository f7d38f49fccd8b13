"""Low-rank adapters: a large model stays frozen, and only small matrices beside its layers train.

Frozen parameters travel once, so rounds send the adapters alone. `merge_adapters` gives a plain
model again, which compression exports.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedcore.errors import TaskError

Model = TypeVar("Model", bound=nn.Module)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights that torch's attention keeps without a layer of their own."""


class LowRankLinear(nn.Module):
    """A frozen dense layer plus ``scale * up(down(x))``, of which ``down`` and ``up`` are trained.

    ``weight`` and ``bias`` are those of the sum, for code that reads a dense layer's weights, such
    as torch's attention.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        self.scale = scale
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in)`` to ``(..., out)``."""
        return cast(Tensor, self.base(x) + self.scale * self.up(self.down(x)))

    @property
    def weight(self) -> Tensor:
        """The sum's weight, ``(out, in)``."""
        return self.base.weight + self.scale * (self.up.weight @ self.down.weight)

    @property
    def bias(self) -> Tensor | None:
        """The sum's bias, ``(out,)``."""
        return self.base.bias


class LowRankSum(nn.Module):
    """Adds ``scale * up @ down`` to a frozen weight, as a parametrisation of torch's."""

    def __init__(self, weight: Tensor, *, rank: int, scale: float) -> None:
        super().__init__()
        out, size = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, size))
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # how torch begins a dense layer

    def forward(self, weight: Tensor) -> Tensor:
        """Maps a weight ``(out, in)`` to the sum."""
        return weight + self.scale * (self.up @ self.down)


def with_adapters(
    model: Model,
    *,
    targets: Sequence[str] = ("*",),
    rank: int = 8,
    alpha: float = 16.0,
    trained: Sequence[str] = (),
) -> Model:
    """Freezes a model, and adds trainable low-rank adapters to its dense layers (LoRA).

    Rounds then send the adapters alone; frozen parameters travel once. The model computes what it
    did before, because adapters begin at zero. Compression merges them into the weights, so the
    released model is as small and as fast as one without. Adapters of the library peft work, too:
    what counts is ``requires_grad``.

    Example::

        def model():
            network = GPT(...)
            network.load_state_dict(safetensors.torch.load_file("pretrained.safetensors"))
            return fedcore.with_adapters(network, targets=["*.attention.*"], rank=4)

    Args:
        model: The model, changed in place.
        targets: Patterns of layers' names, such as ``*.attention.*``. Dense layers
            (`torch.nn.Linear`) and projections of `torch.nn.MultiheadAttention` among them get
            adapters; subclasses that compute something else do not.
        rank: Inner size of an adapter; a layer ``(out, in)`` gets ``rank * (out + in)`` weights.
        alpha: Adapters count ``alpha / rank`` times.
        trained: Patterns of names of parameters that stay trained as they are, such as ``head.*``.

    Returns:
        The model.

    Raises:
        TaskError: a pattern matches nothing, ``rank`` is not a whole number above 0 or ``alpha``
            not a finite one, patterns are not a list, or the model has adapters already.

    Source:
        Hu et al. 2021, arXiv:2106.09685.
    """
    _check_arguments(model, targets, rank, alpha, trained)
    named = dict(model.named_modules(remove_duplicate=False))
    layers = {name: one for name, one in named.items() if _is_adaptable(one)}
    if isinstance(model, nn.Linear):
        raise TaskError(
            "with_adapters: the model is one dense layer, which cannot be replaced in place. "
            "Nothing was changed; wrap it in nn.Sequential."
        )
    wanted = _matching(targets, list(layers), what="targets", of="dense layer")
    kept = _matching(trained, [name for name, _ in model.named_parameters()], what="trained")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    attention = tuple(f"{name}." for name in wanted if not isinstance(layers[name], nn.Linear))
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used twice has one adapter
    for name, layer in layers.items():
        if name in wanted or (attention and name.startswith(attention)):
            if layer not in made:
                made[layer] = _adapted(layer, rank=rank, scale=alpha / rank)
            _replace(model, name, made[layer])
    return model


def _check_arguments(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, trained: Sequence[str]
) -> None:
    """Raises a `TaskError` that says which argument of `with_adapters` cannot be used."""
    if type(rank) is not int or rank < 1:
        raise TaskError(
            f"with_adapters: got rank {rank!r}, expected a whole number above 0. Nothing was "
            "changed."
        )
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise TaskError(
            f"with_adapters: got alpha {alpha!r}, expected a finite number above 0. Nothing was "
            "changed."
        )
    for what, patterns in (("targets", targets), ("trained", trained)):
        if isinstance(patterns, str) or not all(isinstance(one, str) for one in patterns):
            raise TaskError(
                f"with_adapters: got {what} {patterns!r}, expected a list of patterns, such as "
                f'{what}=["head*"]. Nothing was changed.'
            )
    if any(isinstance(one, LowRankLinear | LowRankSum) for one in model.modules()):
        raise TaskError(
            "with_adapters: the model has adapters already, and a second call would freeze them. "
            "Nothing was changed; call it once, with all targets."
        )


def _is_adaptable(layer: nn.Module) -> bool:
    """Returns whether a layer's output is that of its weight, so that adapters can be merged."""
    if isinstance(layer, nn.Linear):
        # Norms that hooks compute, as `torch.nn.utils.weight_norm` does, leave a stale weight.
        own = "weight" in layer._parameters or parametrize.is_parametrized(layer, "weight")
        return own and type(layer).forward is nn.Linear.forward
    return isinstance(layer, nn.MultiheadAttention)


def _matching(
    patterns: Sequence[str], names: Sequence[str], *, what: str, of: str = "parameter"
) -> set[str]:
    """Returns the names that any pattern matches.

    Raises:
        TaskError: a pattern matches none.
    """
    found = set[str]()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise TaskError(
                f"with_adapters: {what} {pattern!r} matches no {of} of the model; those are "
                f"{', '.join(names[:20]) or 'none'}. Nothing was changed; correct the pattern."
            )
        found |= hits
    return found


def _adapted(layer: nn.Module, *, rank: int, scale: float) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return LowRankLinear(layer, rank=rank, scale=scale)
    for name in _PROJECTIONS:
        weight = getattr(layer, name, None)
        if weight is not None:
            added = LowRankSum(weight, rank=rank, scale=scale)
            parametrize.register_parametrization(layer, name, added)
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    if name:  # attention that is the model itself stays in place
        setattr(model.get_submodule(parent), own, layer)


def merge_adapters(model: Model) -> Model:
    """Returns a model whose adapters are merged into the weights, which are then trainable.

    Its outputs are the same up to rounding. Merges adapters of `with_adapters` and of the library
    peft. A model without adapters is returned unchanged, any other is copied.

    Example::

        plain = fedcore.merge_adapters(result.model)  # what compression exports
    """
    if not any(_is_adapted(layer) for layer in model.modules()):
        return model
    merged = copy.deepcopy(model)
    if _is_adapted(merged):
        return cast(Model, _merged(merged))
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in list(merged.named_modules(remove_duplicate=False)):
        if _is_adapted(layer):
            if layer not in made:
                made[layer] = _merged(layer)
            _replace(merged, name, made[layer])
    return merged


def _is_adapted(layer: nn.Module) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return any(parametrize.is_parametrized(layer, name) for name in _PROJECTIONS)
    return isinstance(layer, LowRankLinear) or _is_peft(layer)


def _is_peft(layer: nn.Module) -> bool:
    return hasattr(layer, "get_base_layer") and callable(getattr(layer, "merge", None))


def _merged(layer: nn.Module) -> nn.Module:
    """Returns an adapted layer as a plain one; may change it."""
    if isinstance(layer, LowRankLinear):
        weight = layer.weight.detach()
        if parametrize.is_parametrized(layer.base):  # such as a norm, which is part of the weight
            return _dense(weight, layer.bias).train(layer.training)
        plain = copy.copy(layer.base)
        plain._parameters = dict(layer.base._parameters)  # a tied weight keeps its other owner
        plain.weight = nn.Parameter(weight)
        return plain.requires_grad_()
    if isinstance(layer, nn.MultiheadAttention):
        return _merged_attention(layer)
    own: Any = layer  # of peft
    own.merge()
    base: nn.Module = own.get_base_layer()
    return base.requires_grad_()


def _dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, size = weight.shape
    layer = nn.Linear(size, out, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def _merged_attention(layer: nn.MultiheadAttention) -> nn.MultiheadAttention:
    adapted = [name for name in _PROJECTIONS if parametrize.is_parametrized(layer, name)]
    weights = {name: getattr(layer, name).detach() for name in adapted}
    # `remove_parametrizations` would change the class, which a copied layer shares with its source.
    del layer._modules["parametrizations"]
    layer.__class__ = type(layer).__bases__[0]
    for name, weight in weights.items():
        layer.register_parameter(name, nn.Parameter(weight))
    return layer
