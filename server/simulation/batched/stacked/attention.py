"""Multi-head attention of many clients: each one's projections, and the heads of all at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from server.simulation.batched.dropout import DropoutStreams
from server.simulation.batched.stacked.weights import NotStackable, StackedWeight


def linear(clients: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Applies dense layers ``(K, out, in)`` to inputs ``(K * B, ..., in)`` of their clients."""
    rows, turned = x.reshape(clients, -1, x.shape[-1]), weight.transpose(1, 2)
    if bias is None:
        found = torch.bmm(rows, turned)
    else:
        found = torch.baddbmm(bias.unsqueeze(1), rows, turned)
    return found.view(*x.shape[:-1], -1)


def attend(
    streams: DropoutStreams,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Is `torch.nn.functional.scaled_dot_product_attention`, with each client's own dropout."""
    if not dropout_p:
        return functional.scaled_dot_product_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        raise NotStackable("it uses grouped-query attention with dropout")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    scores = _scores(query * scale, key, mask)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:  # as torch: 0 where everything is masked, not NaN
        none = scores.isneginf().all(dim=-1, keepdim=True)
        weights = scores.masked_fill(none, 0).softmax(dim=-1).masked_fill(none, 0)
    return weights * streams.keep(weights, dropout_p) @ value


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-2, -1)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return scores


def multi_head(
    streams: DropoutStreams,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Is `torch.nn.functional.multi_head_attention_forward` for ``K * B`` sequences.

    Raises:
        NotStackable: an option of it is used that few models use.
    """
    odd = bias_k is not None or add_zero_attn or use_separate_proj_weight or query.dim() != 3
    if odd or any(other is not None for other in others.values()):
        raise NotStackable("it uses an unusual option of multi-head attention")
    if not isinstance(in_proj_weight, StackedWeight) or not isinstance(
        out_proj_weight, StackedWeight
    ):
        raise NotStackable("the weights of its attention are not parameters")
    clients = len(streams.counts)
    parts = _projected(clients, (query, key, value), in_proj_weight, in_proj_bias)
    q, k, v = (one.view(*one.shape[:2], num_heads, -1).transpose(1, 2) for one in parts)
    mask = _mask(attn_mask, key_padding_mask, num_heads, q.dtype)
    p = dropout_p if training else 0.0
    weights = None
    if need_weights:
        weights = _scores(q * math.sqrt(1.0 / q.shape[-1]), k, mask).softmax(dim=-1)
        if p:
            weights = weights * streams.keep(weights, p)
        found = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        found = attend(streams, q, k, v, mask, p)
    joined = found.transpose(1, 2).flatten(2)
    bias = out_proj_bias.stacked if isinstance(out_proj_bias, StackedWeight) else None
    result = linear(clients, joined, out_proj_weight.stacked, bias).transpose(0, 1)
    return result.contiguous(), weights  # in torch's memory order: dropout draws in this order


def _projected(
    clients: int, given: tuple[Tensor, Tensor, Tensor], weight: StackedWeight, bias: Tensor | None
) -> list[Tensor]:
    """Returns query, key and value, ``(K * B, T, E)`` each, from ``(T, K * B, E)`` each."""
    biases = bias.stacked if isinstance(bias, StackedWeight) else None
    if given[0] is given[1] and given[1] is given[2]:
        found = linear(clients, given[0].transpose(0, 1), weight.stacked, biases)
        return list(found.chunk(3, dim=-1))
    weights = weight.stacked.chunk(3, dim=1)
    each = [None] * 3 if biases is None else biases.chunk(3, dim=1)
    return [
        linear(clients, one.transpose(0, 1), mine, own)
        for one, mine, own in zip(given, weights, each, strict=True)
    ]


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Returns both masks as one that is added to the scores, for ``(K * B, heads, T, S)``."""
    found = None if attn_mask is None else _added(attn_mask, dtype)
    if found is not None and found.dim() == 3:
        found = found.view(-1, heads, *found.shape[1:])
    if padding is None:
        return found
    keys = _added(padding, dtype)[:, None, None]
    return keys if found is None else found + keys


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
