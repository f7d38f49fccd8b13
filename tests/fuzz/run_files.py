"""Run files and owners' files: TOML that a person wrote, and overrides of a command line."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fedcore.config.owner import load_owner
from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run
from tests.fuzz.mutate import Pairs, Raw, copied, damage, damaged, packed, unpacked

_WORDS = (
    *("example", "client", "both", "none", "FedAvg", "FedAdam", "auto", "federated", "adaptive"),
    *("privacy", "federation", "client", "release", "22:00-06:00", "epochs", "rounds", "datasets"),
)
_OVERRIDES = (
    *(
        "federation.rounds=5",
        "client.epochs=1e9",
        "privacy.unit=example",
        "a.b.c=1",
        "=",
        "x",
        ".=1",
    ),
    *(
        "privacy.client.clip_norm=adaptive",
        "federation=3",
        "name=\x1b[2J",
        "name='\\u001b'",
        "a=[[[[",
    ),
    *(
        "federation.rounds=" + "9" * 5000,
        "client.batch_size=nan",
        "seed=-1",
        "name=a\nb",
        "k=" + "x" * 9000,
    ),
)


@cache
def _files() -> tuple[Any, ...]:
    run = Pairs(
        [
            ("name", "trial"),
            ("task", "task.py"),
            ("seed", 3),
            (
                "federation",
                Pairs([("rounds", 3), ("cohort", 3), ("quorum", 0.5), ("deadline_s", 60.0)]),
            ),
            ("client", Pairs([("batch_size", 8), ("epochs", 1), ("learning_rate", 0.1)])),
            (
                "privacy",
                Pairs([("unit", "example"), ("max_epsilon", 8.0), ("noise_multiplier", 1.0)]),
            ),
            ("finetune", Pairs([("epochs", 5), ("max_metric_drop", 1.0)])),
            (
                "compression",
                Pairs([("candidates", ["fp32", "int8_dynamic"]), ("timing_runs", 100)]),
            ),
            ("release", Pairs([("repository", "releases"), ("keys", "keys")])),
        ]
    )
    owner = Pairs(
        [
            ("max_epsilon", 4.0),
            ("max_memory_bytes", 10**9),
            ("max_round_s", 60),
            ("hours", ["22:00-06:00"]),
            ("tasks", ["a" * 64]),
            ("datasets", [Pairs([("name", "one"), ("path", "/tmp/one"), ("max_epsilon", 1.0)])]),
        ]
    )
    unset = {*RunConfig.model_fields} - {name for name, _ in run}
    more = Pairs([*run, *((name, Pairs()) for name in sorted(unset) if name in ("cloud", "data"))])
    return run, owner, more


def make(rng: Random) -> bytes:
    """A file of either kind, with overrides where it is a run's."""
    which = rng.choice((0, 0, 0, 1, 2))
    tree = copied(_files()[which])
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        tree = damage(rng, tree, _WORDS)
    raw = toml(tree).encode(errors="surrogatepass")
    if rng.randrange(8) == 0:
        raw = damaged(rng, raw)
    overrides = rng.sample(_OVERRIDES, rng.choice((0, 0, 0, 1, 2)))
    return packed([b"o" if which == 1 else b"r", raw, *(one.encode() for one in overrides)])


def toml(tree: Any) -> str:
    """A tree as TOML, where there is a way to write it."""
    if not isinstance(tree, Pairs):
        return _value(tree)
    plain = [(name, value) for name, value in tree if not isinstance(value, Pairs)]
    tables = [(name, value) for name, value in tree if isinstance(value, Pairs)]
    lines = [f"{_key(name)} = {_value(value)}" for name, value in plain]
    for name, table in tables:
        lines += [f"[{_key(name)}]", *(f"{_key(key)} = {_value(value)}" for key, value in table)]
    return "\n".join(lines) + "\n"


def _key(name: object) -> str:
    text = str(name)
    return text if text.isascii() and text.replace("_", "a").isalnum() else _value(text)


def _value(value: Any) -> str:
    if isinstance(value, Raw):
        return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(value, str(value))
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{_key(name)} = {_value(one)}" for name, one in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(map(_character, value)) + '"'
    return (
        {None: "''", True: "true", False: "false"}.get(value, repr(value))
        if value is None or isinstance(value, bool)
        else repr(value)
    )


def _character(one: str) -> str:
    if one in '"\\':
        return "\\" + one
    if one.isprintable() or ord(one) >= 0xD800:
        return one
    return f"\\u{ord(one):04x}"


_FOLDER = tempfile.TemporaryDirectory(prefix="fedcore-fuzz-")


def read(raw: bytes) -> None:
    """As `fedcore simulate` and `fedcore client start` read them."""
    kind, content, *overrides = unpacked(raw)
    path = Path(_FOLDER.name) / ("owner.toml" if kind == b"o" else "run.toml")
    path.write_bytes(content)
    if kind == b"o":
        load_owner(path)
        return
    run = load_run(path, [one.decode() for one in overrides])
    RunConfig.model_validate_json(run.model_dump_json())
