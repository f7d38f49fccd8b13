from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from fedcore.config import CANDIDATES, CandidateName, Client, Privacy, Release, RunConfig, Section

SECTIONS: list[type[Section]] = [
    field.annotation
    for field in RunConfig.model_fields.values()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
]


def test_every_section_is_frozen_strict_and_closed() -> None:
    assert len(SECTIONS) == 8
    everything: list[type[Section]] = [*SECTIONS, RunConfig]
    for section in everything:
        assert section.model_config["frozen"]
        assert section.model_config["strict"]
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["allow_inf_nan"] is False


def test_the_candidates_are_all_that_may_be_named() -> None:
    assert get_args(CandidateName) == CANDIDATES


def test_the_released_model_has_the_runs_name_unless_told_otherwise() -> None:
    assert RunConfig(name="digits", task="t.py").model_name == "digits"
    named = RunConfig(name="digits", task="t.py", release=Release(model="mnist"))
    assert named.model_name == "mnist"


def test_paths_start_from_the_folder_of_the_file() -> None:
    run = RunConfig(name="x", task="t.py", base=Path("/a/b"))
    assert run.path("../c") == Path("/a/c")
    assert run.path("/d") == Path("/d")


def test_where_the_file_lies_is_no_part_of_the_run() -> None:
    here = RunConfig(name="x", task="t.py", base=Path("/a"))
    there = RunConfig(name="x", task="t.py", base=Path("/b"))
    assert here.model_dump(mode="json") == there.model_dump(mode="json")
    assert "base" not in repr(here)


def test_private_is_what_the_unit_says() -> None:
    assert not RunConfig(name="x", task="t.py").private
    assert RunConfig(name="x", task="t.py", privacy=Privacy(unit="example")).private
    for unit, of_examples, of_clients in (
        ("none", False, False),
        ("example", True, False),
        ("client", False, True),
        ("both", True, True),
    ):
        run = RunConfig.model_validate({"name": "x", "task": "t.py", "privacy": {"unit": unit}})
        assert (run.private, run.client_private, run.uniform) == (
            of_examples,
            of_clients,
            of_clients,
        )


def test_a_model_made_in_code_is_checked_as_a_file_is() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Client(learning_rate=0.0)
    with pytest.raises(ValidationError, match="belong together"):
        RunConfig(name="x", task="t.py", release=Release(keys="k"))
