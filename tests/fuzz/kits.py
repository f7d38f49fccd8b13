"""Kits, as an operator sends them: JSON around two certificates."""

from __future__ import annotations

from random import Random

from fedcore.crypto.kit import KitFile, parse_kit
from tests.fuzz.mutate import TEXTS, damaged, damaged_json
from tests.fuzz.project import NOW, certificates, odd_certificates, project, repem

_SERVERS = (
    "https://127.0.0.1:9092",
    "https://[::1]:1",
    "http://x:1",
    "https://h:99999",
    *TEXTS[:9],
)


def make(rng: Random) -> bytes:
    """A kit: a valid one, or one whose JSON, certificates or bytes are wrong."""
    held = certificates() if rng.randrange(3) else odd_certificates()
    certificate, authority = rng.choice(held), project().authority_pem
    if rng.randrange(4) == 0:
        certificate = repem(rng, certificate)
    if rng.randrange(8) == 0:
        authority = rng.choice((repem(rng, authority), certificate, rng.choice(odd_certificates())))
    file = KitFile.model_construct(
        servers=("https://127.0.0.1:9092", "https://fl.example.org:9092"),
        certificate=certificate,
        authority=authority,
    )
    raw = file.to_bytes()
    return damaged_json(rng, raw, _SERVERS) if rng.randrange(3) else damaged(rng, raw)


def read(raw: bytes) -> None:
    """As `fedcore client install` reads it."""
    kit = parse_kit(raw, now=NOW, where="kit.json")
    assert kit.subject.name.isprintable()
    assert len(kit.subject.name) <= 200
