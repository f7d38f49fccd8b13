"""How gradients travel between processes: whole, rounded to 16 bits, or as low-rank factors."""

# Annotations are objects here: DDP inspects those of its hooks.
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fedcore.config.finetune import Finetune

_START = 10
"""Steps whose gradients travel whole before PowerSGD begins: they change most, and DDP arranges
them anew after the first one."""


def compress_gradients(parallel: DistributedDataParallel, settings: Finetune) -> None:
    """Has DDP exchange gradients by ``finetune.communication``.

    Source:
        Vogels et al. 2019, arXiv:1905.13727 (PowerSGD, with error feedback).
    """
    if settings.communication == "bf16":
        parallel.register_comm_hook(None, _rounded)
    elif settings.communication == "powersgd":
        state = PowerSGDState(
            process_group=None,
            matrix_approximation_rank=settings.powersgd_rank,
            start_powerSGD_iter=_START,
            random_seed=0,  # equal in all processes; drives the first factors alone
        )
        in_order = _one_by_one if dist.get_backend() == "gloo" else powerSGD_hook
        parallel.register_comm_hook(state, in_order)


def _one_by_one(state: PowerSGDState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Returns PowerSGD's mean of a bucket's gradients, once it is complete.

    Each of the hook's collectives is started by a callback of the one before. Under gloo, threads
    run these callbacks, so those of two buckets come in another order in each process, and tensors
    of one meet those of the other.
    """
    future = powerSGD_hook(state, bucket)
    future.wait()
    return future


def _rounded(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Returns the mean of a bucket's gradients, which travel in bfloat16.

    torch's own hook, `bf16_compress_hook`, refuses gloo, which sums bfloat16 all the same.
    """
    whole = bucket.buffer()
    sent = whole.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()

    def restored(done: torch.futures.Future[Any]) -> Tensor:
        return whole.copy_(cast(Tensor, done.value()[0]))

    return future.then(restored)  # type: ignore[no-any-return]
