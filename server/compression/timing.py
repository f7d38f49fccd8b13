"""Fair latency comparison of models on a machine with varying load."""

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

BLOCKS = 50  # many short ones spread a passing load over all models
_WARM_UP = 5  # calls that refill caches before timing
TORCH = "torch"


@dataclass(frozen=True)
class CandidateTiming:
    """Latency of one inference at batch size 1."""

    p50_us: float
    """Median over all timed runs."""
    p50_min_us: float
    p50_max_us: float
    """Smallest and largest median of a block: the influence of other load on the machine."""


def time_candidates(
    files: Mapping[str, bytes],
    module: nn.Module,
    example_input: Tensor,
    *,
    threads: int,
    runs: int,
) -> dict[str, CandidateTiming]:
    """Times ONNX files in onnxruntime and a torch module in eager mode, interleaved.

    Args:
        files: ONNX files by name.
        module: The full model; timed on one thread.
        example_input: One input, without the batch dimension.
        threads: Number of onnxruntime threads.
        runs: Number of timed inferences per model.

    Returns:
        The timing of each file under its name, and of the module under ``torch``.
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
    """Times calls in interleaved blocks, so that a slow phase of the machine affects all equally.

    Each block times every call ``runs / blocks`` times. The order rotates between blocks, so that
    no call always runs after the same predecessor and its cache contents.
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
