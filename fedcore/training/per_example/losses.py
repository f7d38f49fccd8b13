"""Per-example losses and their gradients with respect to the outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedcore.task.definition import Loss
from fedcore.training.per_example.mapping import vmap


def example_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each example's own loss and its gradient with respect to the outputs.

    A loss is the mean over a batch, so an example's own loss is that of a batch of one.

    Args:
        loss: Mean loss over a batch.
        outputs: Shape ``(K, B, ...)``, detached or not; no gradients flow through this function.
        targets: Shape ``(K, B, ...)``.

    Returns:
        Losses ``(K, B)``, and gradients of the outputs' shape.
    """
    if is_cross_entropy(loss) and targets.dtype == torch.long and outputs.dim() == 3:
        return _cross_entropy(outputs.detach(), targets)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        single = vmap(vmap(lambda o, t: loss(o.unsqueeze(0), t.unsqueeze(0))))
        losses = single(leaf, targets.clone())
        (grads,) = torch.autograd.grad(losses.sum(), [leaf])
    return losses.detach(), grads.contiguous()  # for a sum they are one expanded value


def is_mean(loss: Loss, outputs: Tensor, targets: Tensor) -> bool | None:
    """Returns whether a batch's loss is the mean of its examples' own losses.

    Outputs and targets have shape ``(B, ...)``. Returns None if the batch's loss is not finite,
    which leaves the question open.
    """
    with torch.no_grad():
        whole = loss(outputs, targets)
        each = [loss(o.unsqueeze(0), t.unsqueeze(0)) for o, t in zip(outputs, targets, strict=True)]
    if not torch.isfinite(whole):
        return None
    return torch.allclose(torch.stack(each).mean(), whole, rtol=1e-4, atol=1e-6)


def is_cross_entropy(loss: Loss) -> bool:
    """Returns whether a loss is torch's cross-entropy over plain classes.

    Plain means without class weights, label smoothing or an ignored class, and with mean reduction.
    """
    if type(loss) is nn.CrossEntropyLoss:  # a subclass may do anything
        plain = loss.weight is None and loss.label_smoothing == 0 and loss.ignore_index < 0
        return plain and loss.reduction == "mean"
    return loss is nn.functional.cross_entropy


def _cross_entropy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logs = torch.log_softmax(outputs, dim=-1)
    index = targets.unsqueeze(-1)
    losses = logs.gather(-1, index).squeeze(-1).neg_()
    grads = logs.exp_()
    grads.scatter_add_(-1, index, grads.new_full((), -1.0).expand(index.shape))
    return losses, grads
