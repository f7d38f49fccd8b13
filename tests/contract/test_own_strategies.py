"""What a strategy of a user's own may not do, and what is said where it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam

from fedcore import Algorithm, ClientSettings
from fedcore.config.client_settings import SETTABLE, settings_with
from fedcore.config.run import ClientConfig, RunConfig
from fedcore.errors import ConfigError, RoundFailed
from fedcore.task.model import build_model
from server.live.rounds.settings import device_settings
from server.preflight import check_strategy
from server.rounds.checkpointing.run_identity import check_same, identity_of
from tests.contract.own_strategies import NAMES, PRIVATE, TASK, run_of, start_of, train


def write(folder: Path, body: str, *, more: str = "") -> Path:
    """A file with a class ``Mine``; what ``body`` leaves out is that of federated averaging."""
    text = "import numpy as np\nfrom fedcore import Algorithm, ClientSettings\n\n\n"
    text += f"class Mine(Algorithm):\n    folds = True\n{body}"
    if "def step" not in body and "def aggregate" not in body:
        text += "    def step(self, round, weights, mean, state):\n        return mean, state\n"
    path = folder / "mine.py"
    path.write_text(text + more)
    return path


def check(run: RunConfig, **given: Any) -> str:
    return check_strategy(run, build_model(TASK, run), clients=NAMES, **given)


def refusal(folder: Path, body: str, **settings: Any) -> str:
    """What the check before a run says of a class with ``body``."""
    write(folder, body)
    with pytest.raises(ConfigError) as caught:
        check(run_of("mine.py:Mine", base=folder, **settings))
    said = str(caught.value)
    assert said.startswith("federation.strategy = 'mine.py:Mine'")
    assert "Nothing was run" in said
    return said


def method(name: str, result: str) -> str:
    arguments = {
        "initial": "weights",
        "configure": "round, clients, state",
        "step": "round, weights, mean, state",
    }[name]
    return f"    def {name}(self, {arguments}):\n        {result}\n"


WRONG_STEPS = {
    "return mean": "step returned an array of float32 (75,), expected (weights, state)",
    "return None": "step returned None, expected (weights, state)",
    "return mean.tolist(), state": "step returned weights that are a list, expected a float32",
    "return mean[:5], state": "step returned weights of shape (5,), expected (75,)",
    "return mean * np.nan, state": "step returned weights that are not all finite",
    "return np.full(75, 1e300), state": "step returned weights that are not all finite",
    "return mean.astype(int), state": "step returned weights that are an array of int64 (75,)",
    "return mean, None": "step returned a state that is None, expected a dict",
    "return mean, {1: 2}": "step returned a state with the name 1, expected text",
    "return mean, {'a': [1]}": "a state in which 'a' is a list, which cannot be stored",
    "return mean, {'a': np.array('x')}": "a state in which 'a' is an array of <U1 ()",
    "return mean, {'a': np.array(1j)}": "'a' is an array of complex128 (), which cannot be stored",
    "return mean, {'a': np.array(None)}": "'a' is an array of object (), which cannot be stored",
    "mean += 1; return mean, state": "step raised ValueError: output array is read-only (line ",
    "self.v = mean; return mean, state": "step changed self.v, expected it to be unchanged",
    "return mean, state['x']": "step raised KeyError: 'x' (line 8 of its file)",
}


@pytest.mark.parametrize("result", WRONG_STEPS)
def test_a_step_is_checked_before_a_run(tmp_path: Path, result: str) -> None:
    said = refusal(tmp_path, method("step", result))
    assert WRONG_STEPS[result] in said
    assert "synthetic updates, before the first round" in said


WRONG_SETTINGS = {
    "ClientSettings(learning_rate=0.0)": "asks for learning_rate = 0.0, expected greater than or",
    "ClientSettings(learning_rate=float('nan'))": "asks for learning_rate = nan, expected",
    "ClientSettings(learning_rate='0.1')": "asks for learning_rate = '0.1', expected a valid numb",
    "ClientSettings(epochs=0)": "asks for epochs = 0, expected greater than or equal to 1",
    "ClientSettings(epochs=1.5)": "asks for epochs = 1.5, expected a valid integer",
    "ClientSettings(epochs=True)": "asks for epochs = True, expected a valid integer",
    "ClientSettings(momentum=1.0)": "asks for momentum = 1.0, expected less than 1",
    "ClientSettings(proximal_mu=-1.0)": "asks for proximal_mu = -1.0, expected a number from 0",
    "ClientSettings(rate=1.0)": "configure raised TypeError: ",
    "{'client-1': ClientSettings(epochs=0)}": "asks client 'client-1' for epochs = 0, expected",
    "{'client-1': 3}": "configure returned an int for client 'client-1', expected ClientSett",
    "0.1": "configure returned a float, expected ClientSettings, or a mapping",
    "None": "configure returned None, expected ClientSettings, or a mapping",
    "ClientSettings(learning_rate=0.1 * (1 - round.progress))": (
        "in the last round, 4, configure asks for learning_rate = 0.0"
    ),
}


@pytest.mark.parametrize("asked", WRONG_SETTINGS)
def test_settings_are_checked_before_a_run(tmp_path: Path, asked: str) -> None:
    said = refusal(tmp_path, method("configure", f"return {asked}"))
    assert WRONG_SETTINGS[asked] in said


def test_what_raises_with_the_last_rounds_state_alone_is_not_held_against_it(
    tmp_path: Path,
) -> None:
    body = method("initial", "return {'left': 4}") + method(
        "configure", "return ClientSettings(learning_rate=0.1 / (state['left'] + round.number - 5))"
    )
    step = method("step", "return mean, {'left': state['left'] + 1}")
    write(tmp_path, body.replace("- 5", "- 4.5") + step)
    assert check(run_of("mine.py:Mine", base=tmp_path))


PLACES: dict[str, Callable[[Path], None]] = {
    "there is no file": lambda folder: None,
    "has no class 'Mine'. Did you mean 'Mino'?": lambda folder: _plain(folder, "class Mino: pass"),
    "importing": lambda folder: _plain(folder, "1 / 0"),
    "it is an int, expected a subclass of fedcore.Algorithm": lambda f: _plain(f, "Mine = 3"),
    "it is class Mine, expected a subclass": lambda folder: _plain(folder, "class Mine: pass"),
    "it is class Mine without aggregate_evaluate, aggregate_train": lambda folder: _plain(
        folder, "from flwr.serverapp.strategy import Strategy\nclass Mine(Strategy): pass"
    ),
    "Mine has folds = True, which needs a method step, but it has aggregate": lambda f: _plain(
        f,
        "from fedcore import Algorithm\nclass Mine(Algorithm):\n"
        "    def aggregate(self, *a): return a",
    ),
    "Mine has folds = False, which needs a method aggregate. Nothing": lambda folder: _plain(
        folder, "from fedcore import Algorithm\nclass Mine(Algorithm):\n    folds = False"
    ),
    "Mine.folds = 1, expected True or False": lambda folder: _plain(
        folder, "from fedcore import Algorithm\nclass Mine(Algorithm):\n    folds = 1"
    ),
    "it derives from a Flower strategy for trees": lambda folder: _plain(
        folder,
        "from flwr.serverapp.strategy import FedXgbBagging\nclass Mine(FedXgbBagging): pass",
    ),
}


def _plain(folder: Path, text: str) -> None:
    (folder / "mine.py").write_text(text + "\n")


@pytest.mark.parametrize("said", PLACES)
def test_a_file_and_its_class_are_checked_before_a_run(tmp_path: Path, said: str) -> None:
    PLACES[said](tmp_path)
    with pytest.raises(ConfigError, match=re.escape(said)):
        check(run_of("mine.py:Mine", base=tmp_path))


@pytest.mark.parametrize("name", ["mine:Mine", "mine.py:", ":Mine", "mine.py:a b", "x:y:z"])
def test_what_names_no_file_and_class_says_what_does(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected FILE.py:CLASS, e.g. 'mine.py:MyStrategy'"):
        check(run_of(name, base=tmp_path))


def test_a_misspelt_name_of_flowers_says_how_to_name_ones_own() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'FedAvg'.*'mine.py:MyStrategy'"):
        check(run_of("FedAvgg"))


def test_options_are_the_arguments_of_the_class(tmp_path: Path) -> None:
    body = (
        "    def __init__(self, share=0.5):\n        if share > 1: raise ValueError('too much')\n"
    )
    said = refusal(tmp_path, body, strategy_options={"shares": 1.0})
    assert "unexpected keyword argument 'shares'. Mine accepts: share. Nothing" in said
    said = refusal(tmp_path, body, strategy_options={"share": 2.0})
    assert "Mine refused federation.strategy_options = {'share': 2.0}: ValueError: too much" in said


@pytest.mark.parametrize("training", ["loop", "vectorised"])
@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("configure", "return ClientSettings(epochs=3 - round.number)", "asks for epochs = 0"),
        ("configure", "return {}[round.number] if round.number == 3 else {}", "KeyError: 3 (line "),
        ("step", "return mean * (1 / (3 - round.number)), state", "ZeroDivisionError: "),
        ("step", "return (mean if round.number < 3 else mean[1:]), state", "of shape (74,)"),
    ],
)
def test_a_strategy_that_fails_in_a_round_is_named_with_it(
    tmp_path: Path, training: str, name: str, line: str, said: str
) -> None:
    write(tmp_path, method(name, line))
    run = run_of("mine.py:Mine", base=tmp_path, training=training)
    with pytest.raises(RoundFailed) as caught:
        train(run)
    assert f"round 3: federation.strategy = 'mine.py:Mine': {name} " in str(caught.value)
    assert said in str(caught.value)
    assert "The global model is that of round 2" in str(caught.value)


def test_numbers_of_numpy_are_settings_too() -> None:
    asked = ClientSettings(learning_rate=np.float32(0.25), epochs=np.int64(2))  # type: ignore[arg-type]
    found = settings_with(ClientConfig(), asked, private=False)
    assert (found.learning_rate, found.epochs) == (0.25, 2)


def test_every_setting_that_is_sent_is_read() -> None:
    assert set(SETTABLE) == {
        *("learning_rate", "epochs", "steps", "batch_size", "momentum", "weight_decay"),
        "max_grad_norm",
    }


FLOWERS = """
from flwr.serverapp.strategy import FedAvg


class Halving(FedAvg):
    def __init__(self, rate):
        super().__init__(fraction_train=0.5)
        self.rate = rate

    def configure_train(self, server_round, arrays, config, grid):
        config["learning-rate"] = self.rate / 2**server_round
        return super().configure_train(server_round, arrays, config, grid)
"""


@pytest.mark.parametrize("training", ["loop", "vectorised"])
def test_a_strategy_of_flowers_kind_works_by_its_file(tmp_path: Path, training: str) -> None:
    _plain(tmp_path, FLOWERS)
    options = {"rate": 0.4}
    run = run_of("mine.py:Halving", base=tmp_path, training=training, strategy_options=options)
    assert check(run) == "mine.py:Halving: needs every update of a round"

    class Same(Algorithm):
        def configure(self, round: Any, clients: Any, state: Any) -> ClientSettings:
            return ClientSettings(learning_rate=0.4 / 2**round.number)

        def step(self, round: Any, weights: Any, mean: Any, state: Any) -> Any:
            return mean, state

    found, expected = train(run).weights, train(run_of(training=training), Same()).weights
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_strategy_of_flowers_kind_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    _plain(
        tmp_path,
        "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg):\n"
        "    def __init__(self):\n        super().__init__()\n        self.kept = object()",
    )
    with pytest.raises(
        ConfigError, match=r"Mine.kept is a object, which a checkpoint cannot store"
    ):
        check(run_of("mine.py:Mine", base=tmp_path))


def test_a_strategy_of_flowers_kind_that_fails_to_configure_is_named(tmp_path: Path) -> None:
    _plain(tmp_path, FLOWERS.replace("self.rate / 2**server_round", "1 / 0"))
    run = run_of("mine.py:Halving", base=tmp_path, strategy_options={"rate": 1.0})
    with pytest.raises(RoundFailed, match=r"round 1: mine.py:Halving failed to configure it: Zero"):
        train(run)


def test_what_is_no_strategy_is_refused_from_python_too() -> None:
    import fedcore

    with pytest.raises(ConfigError, match=r"strategy: it is a float, expected a subclass of"):
        fedcore.simulate(TASK, run_of(), strategy=0.1, progress=False)  # type: ignore[arg-type]


def test_under_example_level_privacy_what_is_charged_for_stays(tmp_path: Path) -> None:
    for name, value in (("epochs", 2), ("batch_size", 8)):
        body = method("configure", f"return ClientSettings({name}={value})")
        said = refusal(tmp_path, body, privacy=PRIVATE)
        run = run_of().client
        own = getattr(run, name)
        assert f"asks for {name} = {value}, expected client.{name} = {own}: under" in said
        assert "the noise and the privacy spent in every round depend on it" in said


@pytest.mark.parametrize("training", ["loop", "vectorised"])
def test_under_example_level_privacy_a_learning_rate_changes_no_charge(training: str) -> None:
    class Falling(Algorithm):
        def configure(self, round: Any, clients: Any, state: Any) -> Any:
            rates = {name: 0.1 * (place + 1) for place, name in enumerate(clients)}
            return {name: ClientSettings(learning_rate=rate) for name, rate in rates.items()}

        def step(self, round: Any, weights: Any, mean: Any, state: Any) -> Any:
            return mean, state

    run = run_of(training=training, privacy=PRIVATE, client={"batch_size": 4})
    own, plain = train(run, Falling()), train(run)
    spent = [record.epsilon_max for record in plain.records]
    assert [record.epsilon_max for record in own.records] == spent
    assert not np.array_equal(own.weights, plain.weights)


CLIENT_LEVEL = {
    "unit": "client",
    "client": {"max_epsilon": 1e5, "target_delta": 1e-2, "noise_multiplier": 0.1},
}


def test_under_client_level_privacy_it_must_fold_and_tells_all_the_same(tmp_path: Path) -> None:
    each = "    folds = False\n    def aggregate(self, *a):\n        return a\n"
    said = refusal(tmp_path, each, privacy=CLIENT_LEVEL)
    assert (
        "contradicts privacy.unit = 'client': the privacy accounting covers only a sum of updates"
        in said
    )
    some = method("configure", "return {'client-0': ClientSettings(epochs=2)}")
    said = refusal(tmp_path, some, privacy=CLIENT_LEVEL)
    assert "expected one ClientSettings for all: under client-level privacy the noise hides" in said
    seen = method("configure", "assert not clients; return ClientSettings(learning_rate=0.1)")
    write(tmp_path, seen)
    run = run_of("mine.py:Mine", base=tmp_path, privacy=CLIENT_LEVEL)
    found = train(run)
    assert len(found.records) == 4
    assert not np.array_equal(found.weights, start_of(run))


def test_a_strategy_of_flowers_kind_is_refused_under_client_level_privacy(tmp_path: Path) -> None:
    _plain(tmp_path, FLOWERS)
    run = run_of(
        "mine.py:Halving", base=tmp_path, strategy_options={"rate": 1.0}, privacy=CLIENT_LEVEL
    )
    with pytest.raises(ConfigError, match=r"make it a fedcore\.Algorithm that folds"):
        check(run)


def test_another_file_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("")
    path = write(tmp_path, "")
    run = run_of("mine.py:Mine", base=tmp_path)
    from fedcore.config.owner import OPEN_POLICY

    before = identity_of(run, OPEN_POLICY)
    check_same(tmp_path, before, identity_of(run, OPEN_POLICY))
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"another run, which differs in the strategy file\. Not"):
        check_same(tmp_path, before, identity_of(run, OPEN_POLICY))


def test_devices_are_told_nothing_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, "")
    options = {"secret": 3}
    run = run_of("sub/mine.py:Mine", base=tmp_path, strategy_options=options, cohort=2)
    told = " ".join(device_settings(run, instance="one").values())
    assert "mine" not in told
    assert "secret" not in told
    assert '"cohort":2' in told


def test_torch_is_no_state(tmp_path: Path) -> None:
    class Mine(Algorithm):
        def step(self, round: Any, weights: Any, mean: Any, state: Any) -> Any:
            return mean, {"velocity": torch.zeros(3)}

    with pytest.raises(
        ConfigError, match="'velocity' is a Tensor, which cannot be stored: expected"
    ):
        check(run_of("t:Mine"), strategy=Mine())


def test_an_instance_of_flowers_is_taken_and_left_as_it_was() -> None:
    given = FedAdam(eta=0.05, fraction_train=0.5, min_train_nodes=50)
    before = dict(vars(given))
    named = run_of("FedAdam", strategy_options={"eta": 0.05}, weighting="uniform")
    found, expected = train(run_of("flwr:FedAdam"), given).weights, train(named).weights
    uniform = train(run_of("flwr:FedAdam", weighting="uniform"), given).weights
    assert vars(given) == before
    assert np.abs(uniform - expected).max() <= 1e-5 * np.abs(expected).max()
    assert not np.array_equal(found, uniform)


def test_names_that_are_not_known_yet_are_not_asked_for(tmp_path: Path) -> None:
    write(tmp_path, method("configure", "return {clients[0]: ClientSettings(epochs=0)}"))
    run = run_of("mine.py:Mine", base=tmp_path)
    assert check_strategy(run, build_model(TASK, run)) == "mine.py:Mine: folds updates"
    with pytest.raises(ConfigError, match="asks client 'client-0' for epochs = 0"):
        check(run)


SENDS_NOTHING = "\n    def configure_train(self, *arguments):\n        return []\n"


def test_a_strategy_of_flowers_kind_that_asks_nobody_is_named(tmp_path: Path) -> None:
    text = "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg):\n    folds = True"
    _plain(tmp_path, text + SENDS_NOTHING)
    with pytest.raises(RoundFailed, match=r"round 1: mine.py:Mine failed .*returned no messages"):
        train(run_of("mine.py:Mine", base=tmp_path))
