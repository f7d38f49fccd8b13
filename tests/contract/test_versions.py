"""Packages of which private parts are used are let in as far as these tests ran against them."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedcore import doctor

ROOT = Path(__file__).parents[2]
RUN_AGAINST = {"flwr": ("1.41", "1.42"), "torch": ("2.13",), "uvicorn": ("0.49",)}
"""The minor versions that all of ``tests/contract`` was run against."""


@pytest.mark.parametrize("name", RUN_AGAINST)
def test_the_range_is_what_was_tested(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    asked = [Requirement(line) for lines in extras.values() for line in lines]
    bounds = [one.specifier for one in asked if one.name == name]
    assert bounds
    minors = [f"{major}.{minor}" for major in range(4) for minor in range(100)]
    for bound in bounds:
        assert {one.operator for one in bound} == {">=", "<"}
        assert tuple(one for one in minors if f"{one}.0" in bound) == RUN_AGAINST[name], (
            "run tests/contract against each version of the range, mend what broke, then move the "
            "range and RUN_AGAINST"
        )
    installed = version(name).partition("+")[0]
    assert installed.rpartition(".")[0] in RUN_AGAINST[name]


def test_the_doctor_takes_what_was_tested() -> None:
    assert RUN_AGAINST["flwr"] == doctor.FLOWER
