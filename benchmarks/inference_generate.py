"""The part ``generate`` of the inference benchmark: tokens a second that a device generates.

Beside torch in eager mode, which runs all tokens of the window again for each (nanoGPT's
``generate``), and torch with a cache of keys and values of its own: the same weights, one thread,
in alternating repeats. fedcore's tokens must be torch's where the likeliest is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fedcore
from benchmarks.deployment import Found
from benchmarks.figures import at_least, at_most, row
from benchmarks.gpt import CHARACTERS, GPT
from benchmarks.inference_models import random_draft
from benchmarks.measure import ProgramFailed
from edge_client.inference.generate import Sampling, generated
from server.compression.decode.attach import with_decode_graph
from server.compression.export import export_onnx
from server.compression.runtime import answer, open_session
from server.release.publish import initialise, publish

OURS, WHOLE, EAGER, CACHED = "fedcore", "fedcore-window", "torch-eager", "torch-cache"
WORKLOADS = {"small": (2, 64, 64), "large": (6, 384, 256)}
"""Layers, width and context, as of ``small.toml`` and ``run.toml`` in examples/shakespeare."""
SIZES = {"small": (7, 512), "large": (3, 200)}
"""Repeats, and tokens of each: the large one takes minutes without a cache."""
_PROMPT = [20, 34, 1, 28]
_TOP_K, _TEMPERATURE = 10, 0.8
Draw = Callable[[Tensor], int]


def measure(folder: Path, quick: bool, found: Found) -> None:
    """Fills in tokens a second of each system, and the ratios that are promised."""
    torch.set_num_threads(1)
    for workload, (layers, width, context) in WORKLOADS.items():
        repeats, tokens = (2, 80) if quick else SIZES[workload]
        if quick and workload != "small":
            continue
        torch.manual_seed(0)
        module = GPT(layers, width, context).eval()
        model = _installed(folder, workload, module, context)
        if model.decoder.why_not:
            raise ProgramFailed(f"{workload}: {model.decoder.why_not}")
        systems = _systems(model, module, context)
        rates: dict[str, list[float]] = {name: [] for name in systems}
        for repeat in range(repeats + 1):  # the first one warms up
            for name, generate in systems.items():
                began_s = time.perf_counter()
                for _ in islice(generate(), tokens):
                    pass
                if repeat:
                    rates[name].append(tokens / (time.perf_counter() - began_s))
        for name, each in rates.items():
            found.rows.append(row(name, workload, "tokens_per_s", "1/s", each))
        for other, bound in ((EAGER, 3.0), (CACHED, 1.0)):
            ratio = [a / b for a, b in zip(rates[OURS], rates[other], strict=True)]
            found.checks.append(at_least(f"{workload}: fedcore over {other}", ratio, bound))
        found.checks.append(
            at_most(f"{workload}: tokens unlike torch's", [_unlike(model, module, context)], 0)
        )


def _installed(root: Path, workload: str, module: nn.Module, context: int) -> Any:
    """Releases a model with its decode graph, and opens it as a device does."""
    place = root / workload
    initialise(place / "repository", place / "keys", now=datetime.now(UTC))
    tokens = torch.randint(CHARACTERS, (8, context)).numpy()
    onnx = export_onnx(module, torch.from_numpy(tokens[:2]), labels=(), kind="next_token")
    outputs = answer(open_session(onnx, threads=1), tokens)
    allowed = 1e-3 * float(np.abs(outputs).max())
    onnx = with_decode_graph(onnx, tokens, outputs, allowed=allowed)
    draft = random_draft(workload, onnx, tokens, kind="next_token")
    publish(draft, repository=place / "repository", keys=place / "keys", created=datetime.now(UTC))
    store, root_json = place / "store", place / "keys" / "root.json"
    fedcore.update_model(store, workload, repository=place / "repository", root=root_json)
    return fedcore.open_model(store, workload, threads=1)


def _systems(model: Any, module: nn.Module, context: int) -> dict[str, Callable[[], Iterator[int]]]:
    how: dict[str, Any] = {"temperature": _TEMPERATURE, "top_k": _TOP_K, "seed": 1}
    return {
        OURS: lambda: model.generate(_PROMPT, tokens=1 << 30, **how),
        WHOLE: lambda: generated(
            model.predict, _PROMPT, Sampling(**how), window=context, dtype="int64"
        ),
        EAGER: lambda: eager(module, context, _sampled),
        CACHED: lambda: with_cache(module, context, _sampled),
    }


def _unlike(model: Any, module: nn.Module, context: int) -> int:
    """Tokens that differ from torch's, until the window is full."""
    count = context - len(_PROMPT)
    ours = model.generate(_PROMPT, tokens=count, temperature=0.0)
    theirs = islice(eager(module, context, lambda logits: int(logits.argmax())), count)
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def _sampled(logits: Tensor) -> int:
    """Draws from the likeliest tokens, as nanoGPT's ``generate`` does."""
    logits = logits / _TEMPERATURE
    least = torch.topk(logits, _TOP_K).values[-1]
    logits[logits < least] = -torch.inf
    return int(torch.multinomial(torch.softmax(logits, -1), 1))


@torch.inference_mode()
def eager(module: nn.Module, context: int, draw: Draw) -> Iterator[int]:
    """Runs the last tokens, at most as many as the model takes, for each new one."""
    tokens = torch.tensor([_PROMPT])
    while True:
        tokens = tokens[:, -context:]
        token = draw(module(tokens)[0, -1])
        tokens = torch.cat((tokens, torch.tensor([[token]])), 1)
        yield token


@torch.inference_mode()
def with_cache(module: Any, context: int, draw: Draw) -> Iterator[int]:
    """Keeps keys and values; a full window goes on from its last half, as on a device."""
    seen = fresh = list(_PROMPT)
    kept: list[tuple[Tensor, Tensor]] = []
    length = 0
    while True:
        if length + len(fresh) > context:
            seen = fresh = seen[-context // 2 :]
            kept, length = [], 0
        logits, kept = _step(module, torch.tensor([fresh]), length, kept)
        length += len(fresh)
        token = draw(logits)
        seen, fresh = [*seen, token], [token]
        yield token


def _step(
    module: Any, tokens: Tensor, start: int, kept: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Computes the logits after some tokens, with the weights of a `GPT`."""
    places = torch.arange(start, start + tokens.shape[1])
    x, after = module.tokens(tokens) + module.places(places), []
    for layer, block in enumerate(module.blocks):
        b, t, c = x.shape
        parts = block.attention(block.norm_attention(x))
        parts = parts.view(b, t, 3, block.heads, c // block.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if kept:
            k, v = (torch.cat(both, 2) for both in zip(kept[layer], (k, v), strict=True))
        after.append((k, v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not kept)
        x = x + block.output(seen.transpose(1, 2).reshape(b, t, c))
        x = x + block.forward_layers(block.norm_forward(x))
    return module.head(module.norm(x[:, -1]))[0], after
