"""The commands ``fedcore device infer | generate | status | bench``, for a device's owner."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_client.delivery import store as installed
from edge_client.delivery.store import Installed
from edge_client.inference.answers import answer_lines, answers
from edge_client.inference.confined import MAX_RUNS, predict
from edge_client.inference.inputs import read_text
from edge_client.inference.named import parse_any
from edge_client.installed import (
    TIMED_RUNS,
    InstalledModel,
    ServingSummary,
    list_models,
    time_model,
)
from edge_client.model import EdgeModel
from edge_client.options import (
    limits_of,
    limits_options,
    model_option,
    store_option,
    threads_option,
)
from edge_client.serving.commands import serve_command
from edge_client.update_commands import run, update
from fedcore.artifacts.feedback import latency_text, shift_text
from fedcore.cli import Command, group, show
from fedcore.errors import DigestMismatch
from fedcore.observability.foreign import say
from fedcore.observability.words import counted

_MOST_SHOWN = 8
"""Most features that are listed; JSON has all."""


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MAX_RUNS:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to {MAX_RUNS}, got {text!r}"
        )
    return int(text)


def _infer_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    model_option(parser)
    threads_option(parser)
    limits_options(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="one input or a list of inputs as JSON, e.g. --input x.json; - reads it from standard "
        "input",
    )


def _infer(options: argparse.Namespace) -> int:
    version = _serving(options.store, options.model)
    inputs = parse_any(read_text(options.input), version.manifest, where=options.input)
    outputs = predict(
        version.manifest, version.path, inputs, threads=options.threads, limits=limits_of(options)
    )
    lines = (answer_lines if options.json else answers)(version.manifest, outputs)
    for line in lines:
        say(line)
    return 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    model_option(parser)
    limits_options(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="text of the model's labels, or token numbers with commas, e.g. --prompt 'To be'",
    )
    parser.add_argument(
        "--tokens",
        type=_count,
        default=200,
        metavar="N",
        help="tokens to generate, e.g. --tokens 500 (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0 takes the most likely token, e.g. --temperature 0.8 (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=_count,
        metavar="K",
        help="draw from the K most likely tokens, e.g. --top-k 10 (default: from all)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="equal seeds give equal tokens, e.g. --seed 1"
    )


def _generate(options: argparse.Namespace) -> int:
    model = EdgeModel(_serving(options.store, options.model), limits=limits_of(options))
    numbers = options.prompt.split(",")
    by_number = not model.labels and all(each.strip().isdecimal() for each in numbers)
    found = model.generate(
        [int(each) for each in numbers] if by_number else options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    if options.json:
        tokens = list(found)
        labels = [model.labels[each] for each in tokens] if model.labels else None
        return show(options, "", {"tokens": tokens, "labels": labels})
    for token in found:
        say(model.labels[token] if model.labels else f"{token} ", end="", flush=True)
    say()
    return 0


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)


def _status(options: argparse.Namespace) -> int:
    found = list_models(options.store)
    text = "\n".join(map(_line, found)) or f"{options.store}: no model is installed"
    show(options, text, [_row(one) for one in found])
    return 0 if all(one.version for one in found) else DigestMismatch.exit_code


def _row(one: InstalledModel) -> dict[str, Any]:
    if one.version is None:
        return {"model": one.model, "version": None, "damage": one.damage}
    return asdict(one) | {"tuned": one.tuned and one.tuned.model_dump()}


def _line(one: InstalledModel) -> str:
    if one.version is None:
        return f"{one.model}: no version can be served: {one.damage}"
    how = (
        f"\n  fastest here: {counted(one.tuned.threads, 'thread')} on {one.tuned.provider}, "
        f"{one.tuned.p50_us:.1f} us"
        if one.tuned
        else ""
    )
    damaged = f"\n  the active version cannot be served: {one.damage}" if one.damage else ""
    if one.stale_since:
        damaged += f"\n  stale: not confirmed as the newest since {one.stale_since}"
    return (
        f"{one.model}: version {one.version} of {one.created} serves, {one.candidate}, "
        f"{one.bytes} bytes, sha256 {one.sha256}{how}{damaged}{_served(one.served)}"
    )


def _served(served: ServingSummary | None) -> str:
    """Returns lines on how a version is used; empty if nothing was counted."""
    if served is None:
        return ""
    failed = "" if served.error_rate is None else f", {100 * served.error_rate:.2g} % failed"
    lines = [
        f"served lately: {counted(served.requests, 'request')}{failed}, "
        f"p50 {latency_text(served.p50_us)}, p99 {latency_text(served.p99_us)}"
    ]
    if served.features:
        moved = sum(each.reading != "stable" for each in served.features)
        lines.append(
            f"against the release, over {counted(served.rows, 'row')}: {moved} of "
            f"{counted(len(served.features), 'feature')} moved (stability index)"
        )
        furthest = sorted(served.features, key=lambda each: -each.psi)[:_MOST_SHOWN]
        lines += [f"  {shift_text(each)}" for each in furthest]
    return "".join(f"\n  {line}" for line in lines)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    model_option(parser)
    limits_options(parser)
    parser.add_argument(
        "--runs",
        type=_count,
        default=TIMED_RUNS,
        metavar="N",
        help="timed inferences, e.g. --runs 10000 (default: %(default)s)",
    )


def _bench(options: argparse.Namespace) -> int:
    found = time_model(options.store, options.model, runs=options.runs, limits=limits_of(options))
    _warn(found.version, found.damage)
    text = (
        f"{found.model}: version {found.version}, batch 1, 1 thread, "
        f"{counted(found.runs, 'run')}: p50 {found.p50_us:.1f} us, p99 {found.p99_us:.1f} us"
    )
    return show(options, text, {k: v for k, v in asdict(found).items() if k != "damage"})


def _serving(store: Path, model: str) -> Installed:
    """Returns the version that serves; warns on standard error if it is not the active one."""
    version = installed.serving(store, model)
    _warn(version.manifest.version, version.damage)
    return version


def _warn(version: int, damage: str | None) -> None:
    if damage:
        say(
            f"warning: version {version} serves instead of the active one: {damage}",
            to=sys.stderr,
        )


device = group(
    {
        "update": update,
        "run": run,
        "infer": Command(
            "Answer inputs with the installed model.",
            _infer_arguments,
            _infer,
            "fedcore device infer --store store --model digits --input x.json",
        ),
        "generate": Command(
            "Continue a text or a sequence of tokens with the installed model.",
            _generate_arguments,
            _generate,
            "fedcore device generate --store store --model plays --prompt 'To be' --top-k 10",
        ),
        "status": Command(
            "Show which versions serve, and whether they are intact.",
            _status_arguments,
            _status,
            "fedcore device status --store store --json",
        ),
        "bench": Command(
            "Time single-thread inference on the golden inputs, one at a time.",
            _bench_arguments,
            _bench,
            "fedcore device bench --store store --model digits",
        ),
        "serve": serve_command,
    },
    "Serve released models on this device.",
)
