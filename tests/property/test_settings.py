from __future__ import annotations

import tempfile
from pathlib import Path

import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config.run import ClientConfig, FederationConfig, RunConfig, Serving
from fedcore.config.settings import load_run
from fedcore.errors import ConfigError

RUNS = st.builds(
    RunConfig,
    name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
    task=st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=20),
    seed=st.integers(0, 2**63 - 1),
    federation=st.builds(
        FederationConfig,
        rounds=st.integers(1, 1_000_000),
        cohort=st.none() | st.integers(1, 1_000_000),
        quorum=st.floats(0, 1, exclude_min=True),
        strategy_options=st.dictionaries(
            st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
            st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.sampled_from("ab")),
            max_size=3,
        ),
    ),
    client=st.builds(
        ClientConfig,
        learning_rate=st.floats(1e-9, 1e6),
        momentum=st.floats(0, 1, exclude_max=True),
        device=st.sampled_from(["auto", "cpu", "cuda", "mps"]),
    ),
    serving=st.builds(Serving, threads=st.integers(1, 64)),
)


def loaded(raw: bytes, *overrides: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_bytes(raw)
        return load_run(path, overrides)


def assert_read_or_refused(raw: bytes, *overrides: str) -> None:
    refusal = None
    try:
        run = loaded(raw, *overrides)
    except ConfigError as error:
        refusal = str(error)
    assert "Nothing was run." in refusal if refusal else run.name


@given(RUNS)
def test_what_is_written_is_read_back(run: RunConfig) -> None:
    values = run.model_dump(mode="json", exclude_none=True)
    assert loaded(tomli_w.dumps(values).encode()).model_dump() == run.model_dump()


@given(st.integers(1, 1_000_000), st.floats(1e-9, 1e6))
def test_an_override_means_what_the_file_would(rounds: int, rate: float) -> None:
    required = 'name = "x"\ntask = "t.py"\n'
    text = f"{required}[federation]\nrounds = {rounds}\n[client]\nlearning_rate = {rate!r}\n"
    over = loaded(
        required.encode(), f"federation.rounds={rounds}", f"client.learning_rate={rate!r}"
    )
    assert over.model_dump() == loaded(text.encode()).model_dump()


@given(st.binary(max_size=200))
def test_no_bytes_end_in_anything_but_a_run_or_a_configuration_error(raw: bytes) -> None:
    assert_read_or_refused(raw)


@given(st.text(max_size=40))
def test_no_override_ends_in_anything_but_a_run_or_a_configuration_error(text: str) -> None:
    assert_read_or_refused(b'name = "x"\ntask = "t.py"\n', text)
