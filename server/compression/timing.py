"""Timing models against one another, fairly on a machine that is never quite still."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from server.compression.export import INPUT
from server.compression.runtime import open_session

BLOCKS = 50  # many short ones: a neighbour that comes and goes then meets all alike
_WARM_UP = 5  # calls; the first ones fill caches that others have used
TORCH = "torch"


@dataclass(frozen=True)
class CandidateTiming:
    """How long one inference takes, at batch 1."""

    p50_us: float
    """Median over all timed runs."""
    p50_min_us: float
    p50_max_us: float
    """Least and largest median of a block: what the machine's other work does to the figure."""


def time_candidates(
    files: Mapping[str, bytes],
    module: nn.Module,
    example_input: Tensor,
    *,
    threads: int,
    runs: int,
) -> dict[str, CandidateTiming]:
    """Times ONNX files with onnxruntime and a torch module in eager mode, in turn.

    Args:
        files: ONNX files by name.
        module: The full model; timed on one thread.
        example_input: One input, without the batch dimension.
        threads: Threads of onnxruntime.
        runs: Timed inferences of each.

    Returns:
        One timing for each file under its name, and the module's under ``torch``.
    """
    batch = example_input.unsqueeze(0)
    feed = {INPUT: batch.numpy()}
    calls: dict[str, Callable[[], object]] = {}
    for name, onnx in files.items():
        session = open_session(onnx, threads=threads)
        calls[name] = partial(session.run, None, feed)
    calls[TORCH] = partial(module, batch)

    was_training, torch_threads = module.training, torch.get_num_threads()
    module.eval()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return time_in_turn(calls, runs=runs)
    finally:
        torch.set_num_threads(torch_threads)
        module.train(was_training)


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], *, runs: int, blocks: int = BLOCKS
) -> dict[str, CandidateTiming]:
    """Times calls in interleaved blocks, so that a slow minute of the machine meets all alike.

    Each block times every call ``runs / blocks`` times, beginning with another one each time, so
    that none always runs in the caches that one neighbour left.
    """
    names = list(calls)
    samples: dict[str, list[list[int]]] = {name: [] for name in names}
    for block in range(blocks):
        start = block % len(names)
        for name in (*names[start:], *names[:start]):
            samples[name].append(_time_block(calls[name], max(1, runs // blocks)))
    return {name: _summary(of_blocks) for name, of_blocks in samples.items()}


def _time_block(call: Callable[[], object], runs: int) -> list[int]:
    clock = time.perf_counter_ns
    for _ in range(min(_WARM_UP, runs)):
        call()
    samples = []
    for _ in range(runs):
        start = clock()
        call()
        samples.append(clock() - start)
    return samples


def _summary(blocks: list[list[int]]) -> CandidateTiming:
    medians = [statistics.median(block) / 1e3 for block in blocks]
    p50_us = statistics.median(sample for block in blocks for sample in block) / 1e3
    return CandidateTiming(p50_us, min(medians), max(medians))
