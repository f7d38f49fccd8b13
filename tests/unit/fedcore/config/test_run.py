from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from fedcore.config.owner import DataSet, OwnerPolicy
from fedcore.config.run import (
    CANDIDATES,
    CandidateName,
    ClientConfig,
    ClientPrivacy,
    Privacy,
    ReleaseConfig,
    RunConfig,
    Section,
)
from fedcore.config.simulated import DeviceClass

SECTIONS: list[type[Section]] = [
    field.annotation
    for field in RunConfig.model_fields.values()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
]


def test_every_section_is_frozen_strict_and_closed() -> None:
    assert len(SECTIONS) == 9
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
    named = RunConfig(name="digits", task="t.py", release=ReleaseConfig(model="mnist"))
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
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        ClientConfig(learning_rate=0.0)
    with pytest.raises(ValidationError, match="must be set together"):
        RunConfig(name="x", task="t.py", release=ReleaseConfig(keys="k"))


@pytest.mark.parametrize(
    ("section", "key", "outside", "inside"),
    [
        (ClientConfig, "epochs", (0, 10_001), (1, 10_000)),
        (ClientConfig, "batch_size", (0, 1_000_001), (1, 1_000_000)),
        (ClientConfig, "learning_rate", (0.0, 1e-13, 1.1e6), (1e-12, 1e6)),
        (ClientConfig, "momentum", (-0.1, 1.0), (0.0, 0.999)),
        (ClientConfig, "weight_decay", (-1e-9, 1001.0), (0.0, 1000.0)),
        (Privacy, "max_epsilon", (0.0, 0.009, 1.1e6), (0.01, 1e6)),
        (Privacy, "target_delta", (0.0, 1e-13, 1.0), (1e-12, 0.5)),
        (Privacy, "clip_norm", (0.0, 1e-7, 1.1e6), (1e-6, 1e6)),
        (Privacy, "noise_multiplier", (0.0, 1e-160, 1e-3, 0.0999, 1.1e6), (0.1, 1e6, "auto")),
        (Privacy, "participations", (0, 1_000_001), (1, 1_000_000, None)),
    ],
)
def test_every_number_of_private_training_is_bounded(
    section: type[Section], key: str, outside: tuple[object, ...], inside: tuple[object, ...]
) -> None:
    for value in inside:
        assert getattr(section(**{key: value}), key) == value
    for value in (*outside, float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            section(**{key: value})


@pytest.mark.parametrize(
    "section",
    [*SECTIONS, ClientPrivacy, DeviceClass, OwnerPolicy, DataSet, RunConfig],
    ids=lambda section: section.__name__,
)
def test_no_number_is_left_without_bounds(section: type[Section]) -> None:
    for key, schema in section.model_json_schema()["properties"].items():
        for part in schema.get("anyOf", [schema]):
            if part.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(part), key
                assert {"maximum", "exclusiveMaximum"} & set(part), key


def test_privacy_losses_are_composed_unless_asked_otherwise() -> None:
    assert Privacy().accountant == "prv"
