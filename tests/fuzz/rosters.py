"""Rosters, as a server reads them: JSON, signed by the authority or a key that it vouches for."""

from __future__ import annotations

import json
from functools import cache
from random import Random

from pydantic import ValidationError

from fedcore.crypto.roster import Member, RosterEntry, RosterFile, parse_roster
from tests.fuzz.mutate import damaged, damaged_json
from tests.fuzz.project import certificates, odd_certificates, project, repem

_WORDS = (
    "2026-03-01T12:00:00Z",
    "9999-12-31T23:59:59Z",
    "fedcore.roster/2",
    "members",
    "certificate",
)


@cache
def _signed() -> bytes:
    entries = [RosterEntry(certificate=one, num_examples=600) for one in certificates()[:4]]
    return RosterFile(version=7, members=tuple(entries)).signed(project().key).to_bytes()


@cache
def _known() -> dict[str, Member]:
    return parse_roster(_signed(), project().authority, where="roster.json")[1]


def make(rng: Random) -> bytes:
    """A roster; one that still is one is signed again now and then, as the authority could."""
    values = json.loads(_signed())
    if rng.randrange(3) == 0:
        odd = rng.choice((*odd_certificates(), *certificates(), repem(rng, certificates()[0])))
        rng.choice(values["members"])["certificate"] = odd
    raw = damaged_json(rng, json.dumps(values).encode(), _WORDS)
    if rng.randrange(3):
        try:
            file = RosterFile.model_validate_json(raw)
            raw = file.signed(project().key, file.signer).to_bytes()
        except (ValidationError, ValueError):
            pass
    return damaged(rng, raw) if rng.randrange(10) == 0 else raw


def read(raw: bytes) -> None:
    """As `fedcore.crypto.roster.Roster` reads its file."""
    file, members = parse_roster(raw, project().authority, where="roster.json", known=_known())
    assert file.version >= 1
    assert len(members) == len(file.members)
