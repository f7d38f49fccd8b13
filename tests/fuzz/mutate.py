"""How a valid thing is made an odd one: in its structure, where it has one, or in its bytes.

Everything is chosen by a ``random.Random``. Hypothesis gives one that it can replay and shrink.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any


class Pairs(list[tuple[str, Any]]):
    """A JSON object as pairs, so that a name may come twice and the order is ours."""


class Raw(str):
    """Text that is written as it stands, be it JSON or not."""


TEXTS = (
    *("", "\0", "a\ud800", "\udfff", "\x1b[2J\x07", "\x1b]0;x\x07 FAKE", "two\nlines\r", "\u202e"),
    *("naïve", "\u2028", "\x7f", "\x9b31m", " ", "-", "..", "../../x", "/dev/zero", "a/b", "true"),
    *("1", "1e999", "x" * 200, "x" * 3000, "é" * 900, "\x1b" * 500, "%s%n{0}", "{}", "x" * 70_000),
)
NUMBERS = (
    *(
        0,
        -1,
        1,
        2,
        7,
        2**31 - 1,
        2**31,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**15,
        10**18,
    ),
    *(0.0, -0.0, 0.5, 1.5, 5e-324, 1e-300, 1e300, 1.7e308, -1.7e308, 3e38),
)
_MAX_BYTES = 200_000
"""Of what one change adds: an input shows what a limit does without being far beyond it."""
_WRITTEN = (
    *("NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "9" * 5000, "1e-999", "01", "1.", "0x1"),
    *("[" * 200 + "]" * 200, "[" * 4000, '{"a":' * 150 + "1" + "}" * 150, "\\", "'", "nul", ""),
)


def parsed(raw: bytes) -> Any:
    """JSON as a tree of `Pairs`, lists and plain values."""
    return json.loads(raw, object_pairs_hook=Pairs)


def written(value: Any) -> bytes:
    """A tree as JSON, where it can be written as such."""
    return _written(value).encode(errors="surrogatepass")


def _written(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{_written(one)}" for name, one in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)


def junk(rng: Random, words: Sequence[str] = ()) -> Any:
    """A value that nobody expects, of any type."""
    kind = rng.randrange(8)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4 and words:
        return rng.choice(words)
    if kind == 5:
        odd = (None, True, False, [], Pairs(), [[]], [None] * 300, [0] * 5000)
        return rng.choice(odd)
    if kind == 6:
        return Raw(rng.choice(_WRITTEN))
    return Pairs([(rng.choice((*TEXTS[:12], *words)), rng.choice(NUMBERS))])


def damage(rng: Random, tree: Any, words: Sequence[str] = ()) -> Any:
    """The tree with one thing in it that should not be so; changed in place where it can be."""
    places = [*_places(tree)]
    if not places:
        return junk(rng, words)
    held, place = rng.choice(places)
    change: Callable[..., None] = rng.choice(
        (_replace, _replace, _replace, _near, _near, _remove, _double, _rename, _swap, _repeat)
    )
    change(rng, held, place, words)
    return tree


def _places(tree: Any) -> Iterator[tuple[list[Any], int]]:
    """Every value in a tree, as the list that holds it and its place there."""
    new = [tree]
    while new:
        held = new.pop()
        for place, item in enumerate(held if isinstance(held, list) else ()):
            yield held, place
            below = item[1] if isinstance(held, Pairs) else item
            if isinstance(below, list) and len(below) < 100:
                new.append(below)


def _put(held: list[Any], place: int, value: Any) -> None:
    held[place] = (held[place][0], value) if isinstance(held, Pairs) else value


def _value(held: list[Any], place: int) -> Any:
    return held[place][1] if isinstance(held, Pairs) else held[place]


def _replace(rng: Random, held: list[Any], place: int, words: Sequence[str]) -> None:
    _put(held, place, junk(rng, words))


def _near(rng: Random, held: list[Any], place: int, words: Sequence[str]) -> None:
    """Another value of the same type, so that more than the first check is passed."""
    value = _value(held, place)
    if isinstance(value, bool):
        _put(held, place, not value)
    elif isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value / 3, *NUMBERS)
        _put(held, place, rng.choice(near))
    elif isinstance(value, str) and value:
        cut = rng.randrange(len(value))
        text = rng.choice((*TEXTS[:12], *words))
        _put(held, place, rng.choice((value[:cut] + text + value[cut:], value[:cut], text)))
    else:
        _replace(rng, held, place, words)


def _remove(rng: Random, held: list[Any], place: int, words: Sequence[str]) -> None:
    del held[place]


def _double(rng: Random, held: list[Any], place: int, words: Sequence[str]) -> None:
    held.insert(rng.randrange(len(held) + 1), held[place])


def _rename(rng: Random, held: list[Any], place: int, words: Sequence[str]) -> None:
    if isinstance(held, Pairs):
        held[place] = (rng.choice((*TEXTS, *words)), held[place][1])
    else:
        _replace(rng, held, place, words)


def _swap(rng: Random, held: list[Any], place: int, words: Sequence[str]) -> None:
    other = rng.randrange(len(held))
    mine = _value(held, place)
    _put(held, place, _value(held, other))
    _put(held, other, mine)


def _repeat(rng: Random, held: list[Any], place: int, words: Sequence[str]) -> None:
    """Far more of one thing than there should be, each under a name of its own."""
    count = rng.choice((2, 30, 300, 3000))
    name_size = len(held[place][0]) if isinstance(held, Pairs) else 0
    size = 10 + name_size + len(_written(_value(held, place)))
    count = min(count, _MAX_BYTES // size)
    if isinstance(held, Pairs):
        name, value = held[place]
        held += [(f"{name}{number}", copied(value)) for number in range(count)]
    else:
        held += [copied(held[place]) for _ in range(count)]


def copied(tree: Any) -> Any:
    """A tree of its own: what is changed in one part of it is changed nowhere else."""
    if isinstance(tree, Pairs):
        return Pairs([(name, copied(value)) for name, value in tree])
    return [*map(copied, tree)] if isinstance(tree, list) else tree


def damaged(rng: Random, raw: bytes) -> bytes:
    """Bytes with some of them changed, gone, doubled, in another order, or none of them left."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        kind = rng.randrange(8)
        first, last = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        if kind < 3 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del data[first:]
        elif kind == 4:
            del data[first:last]
        elif kind == 5:
            data[first:first] = data[first : min(last, first + 300)]
        elif kind == 6:
            data[first:first] = rng.choice((b"\0", b"\xff\xff\xff\xff", b"[" * 3000, b"\x1b[31m"))
        else:
            data = bytearray(rng.choice((b"", b"\0" * 300, b"{}", b"[]", b"null", data[last:])))
    return bytes(data)


def damaged_json(rng: Random, raw: bytes, words: Sequence[str] = ()) -> bytes:
    """JSON with up to four things wrong in it; sometimes in its bytes, too."""
    tree = parsed(raw)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        tree = damage(rng, tree, words)
    found = written(tree)[: 1 << 20]
    return damaged(rng, found) if rng.randrange(12) == 0 else found


def packed(parts: Sequence[bytes]) -> bytes:
    """Several byte strings as one: an input is one file, whatever it stands for."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def unpacked(raw: bytes) -> list[bytes]:
    """The byte strings that `packed` put together."""
    parts, place = [], 0
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 4], "big")
        parts.append(raw[place + 4 : place + 4 + size])
        place += 4 + size
    return parts
