"""Settings of Python code and the command line's overrides mean the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config.settings import load_run, overrides_of, with_settings
from fedcore.errors import ConfigError

OPTION = st.one_of(
    st.booleans(),
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)


@given(
    rounds=st.integers(1, 10**6),
    rate=st.floats(1e-9, 1e3),
    options=st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), OPTION, max_size=4),
    candidates=st.permutations(["fp32", "int8_static", "pruned"]),
    uniform=st.booleans(),
)
def test_settings_survive_the_command_line(
    tmp_path_factory: pytest.TempPathFactory,
    rounds: int,
    rate: float,
    options: dict[str, Any],
    candidates: list[str],
    uniform: bool,
) -> None:
    file = tmp_path_factory.getbasetemp() / "run.toml"
    file.write_text('name = "x"\ntask = "t.py"\n')
    settings = {
        "federation": {
            "rounds": rounds,
            "strategy_options": options,
            "weighting": "uniform" if uniform else "examples",
        },
        "client": {"learning_rate": rate},
        "compression": {"candidates": candidates},
    }
    expected = with_settings(load_run(file), settings)
    assert load_run(file, overrides_of(settings)) == expected


def test_a_table_in_a_list_survives() -> None:
    assert overrides_of({"simulation": {"devices": [{"name": "slow", "share": 0.5}]}}) == [
        'simulation.devices=[{"name" = "slow", "share" = 0.5}]'
    ]


def test_what_toml_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"federation\.cohort=None: expected a number"):
        overrides_of({"federation": {"cohort": None}})
