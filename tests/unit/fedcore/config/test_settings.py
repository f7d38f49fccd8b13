from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedcore.config.owner import load_owner
from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run
from fedcore.errors import ConfigError

REQUIRED = 'name = "digits"\ntask = "task.py"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(written(folder, REQUIRED + text), overrides)
    message = str(caught.value)
    assert message.endswith("Nothing was run.")
    return message


def test_the_least_file_gives_every_default(tmp_path: Path) -> None:
    run = load_run(written(tmp_path, REQUIRED))
    assert run.name == "digits"
    assert run.federation.rounds == 10
    assert run.path("task.py") == (tmp_path / "task.py").resolve()


def test_values_of_each_section_are_read(tmp_path: Path) -> None:
    text = (
        REQUIRED + "seed = 7\n[federation]\ncohort = 4\nstrategy_options = {a = 1, b = true}\n"
        '[privacy]\nunit = "example"\nnoise_multiplier = 1\n[compression]\ncandidates = ["fp32"]\n'
    )
    run = load_run(written(tmp_path, text))
    assert (run.seed, run.federation.cohort, run.private) == (7, 4, True)
    assert run.federation.strategy_options == {"a": 1, "b": True}
    assert run.privacy.noise_multiplier == 1.0
    assert run.compression.candidates == ("fp32",)


@pytest.mark.parametrize(
    ("text", "key", "value", "nearest"),
    [
        ("[federation]\nround = 3", "federation.round", "3", "'federation.rounds'"),
        ("[client]\nlerning_rate = 0.5", "client.lerning_rate", "0.5", "'client.learning_rate'"),
        ("[client]\nmax_epsilon = 1.0", "client.max_epsilon", "1.0", "'privacy.max_epsilon'"),
        (
            "[federation]\nbatch_size = 8",
            "federation.batch_size",
            "8",
            "'client.batch_size' or 'finetune.batch_size'",
        ),
        ("rounds = 3", "rounds", "3", "'federation.rounds'"),
        ("[privasy]\nunit = 'none'", "privasy", "{'unit': 'none'}", "'privacy'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    tmp_path: Path, text: str, key: str, value: str, nearest: str
) -> None:
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path}/run.toml: unknown key '{key}' (set to {value}). ")
    assert f"Did you mean {nearest}?" in message


def test_an_unknown_key_is_refused_with_all_that_is_allowed_there(tmp_path: Path) -> None:
    message = refused(tmp_path, "[serving]\nxyz = true")
    assert "unknown key 'serving.xyz' (set to true). Allowed here: threads. " in message
    assert "Did you mean" not in message


def test_a_misspelt_required_key_is_named_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'nam' .*Did you mean 'name'\?"):
        load_run(written(tmp_path, 'nam = "digits"\ntask = "task.py"\n'))


def test_a_required_key_that_is_not_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: task is required and not set"):
        load_run(written(tmp_path, 'name = "digits"\n'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[federation]\nrounds = '3'", "federation.rounds = '3': it should be a valid integer"),
        ("[federation]\nrounds = 3.0", "federation.rounds = 3.0: it should be a valid integer"),
        ("[federation]\nrounds = true", "federation.rounds = true: it should be a valid integer"),
        ("[federation]\nrounds = 0", "= 0: it should be greater than or equal to 1"),
        ("[federation]\nquorum = 1.5", "quorum = 1.5: it should be less than or equal to 1"),
        ("[client]\nmomentum = 1.0", "client.momentum = 1.0: it should be less than 1"),
        ("[client]\nlearning_rate = nan", "learning_rate = nan: it should be a finite number"),
        ("[client]\nlearning_rate = inf", "learning_rate = inf: it should be a finite number"),
        (
            "[client]\ndevice = 'gpu'",
            "device = 'gpu': it should be 'auto', 'cpu', 'cuda' or 'mps'",
        ),
        (
            "[privacy]\nnoise_multiplier = 'none'",
            "noise_multiplier = 'none': it should be a valid number or 'auto'",
        ),
        (
            "[privacy]\nnoise_multiplier = -1",
            "noise_multiplier = -1: it should be greater than or equal to 0.1 or 'auto'",
        ),
        (
            "[federation.strategy_options]\nmu = [1, true]",
            "federation.strategy_options.mu = [1, true]: it should be a valid boolean or",
        ),
        ("[compression]\ncandidates = 'fp32'", "candidates = 'fp32': it should be an array"),
        (
            "[compression]\ncandidates = ['fp32', 'int4']",
            "compression.candidates = 'int4': it should be 'fp32', 'int8_static',",
        ),
        ("[[client]]\nepochs = 1", "client = [{'epochs': 1}]: it should be a table"),
        ("seed = -1", "seed = -1: it should be greater than or equal to 0"),
        (
            "[release]\nmodel = 'My model'",
            "release.model = 'My model': it should be 1 to 64 of a-z, 0-9, '-' and '_'",
        ),
    ],
)
def test_a_value_is_refused_with_what_is_allowed(tmp_path: Path, text: str, said: str) -> None:
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path}/run.toml: ")
    assert said in message


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("9" * 5000, "not valid TOML: Exceeds the limit"),
        ("0x" + "f" * 5000, "rounds = a number with thousands of digits: it should be"),
        ("[" * 3000, "not valid TOML: maximum recursion depth exceeded"),
        ("[" * 150 + "]" * 150, "rounds = [[["),
    ],
    ids=["decimal", "hexadecimal", "deep", "less deep"],
)
def test_numbers_and_arrays_beyond_all_reason_are_refused(
    tmp_path: Path, value: str, said: str
) -> None:
    assert said in refused(tmp_path, f"[federation]\nrounds = {value}")
    message = refused(tmp_path, "", f"federation.rounds={value}")
    assert said in message
    assert message.startswith("--set federation.rounds=")
    assert len(message) < 600
    owner = tmp_path / "owner.toml"
    owner.write_text(f"data = {value}\n")
    with pytest.raises(ConfigError, match=r"owner\.toml: "):
        load_owner(owner)


def test_a_long_value_is_cut_short(tmp_path: Path) -> None:
    assert len(refused(tmp_path, f"[client]\ndevice = '{'x' * 5000}'")) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "remember = 0.3",
            "remember = 0.3 contradicts .* second model. Set it to 0.0",
        ),
        ("every = 2", "every = 2 contradicts .* Leave it out, or set unit to 'none'"),
        ("after_stall = 2", "after_stall = 2 contradicts"),
        ("max_grad_norm = 1.0", "clip_norm bounds each example's gradient instead"),
        ("precision = 'bf16'", "precision = 'bf16' contradicts .* holds in float32"),
        ("communication = 'powersgd'", "noise is added to the whole sum"),
        ("shard = 'always'", "shard = 'always' contradicts .* Set it to 'auto'"),
        ("accumulate_steps = 2", "accumulate_steps = 2 contradicts"),
        ("activation_checkpointing = true", "gradients are computed example by example"),
        ("compile = true", "compile = True contradicts"),
        ("prefetch = 2", "prefetch = 2 contradicts"),
        ("auto = true", "trials would read the data without a charge"),
    ],
)
def test_private_fine_tuning_refuses_what_it_does_not_cover(
    tmp_path: Path, setting: str, said: str
) -> None:
    settings = setting if "remember" in setting else f"remember = 0.0\n{setting}"
    text = f"[finetune]\n{settings}\n[finetune.privacy]\nunit = 'example'"
    assert re.search(said, refused(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[privacy]\nunit = 'both'\n[federation]\nevaluate_cohort = 2\nholdout = 0.1",
            "federation.evaluate_cohort = 2 contradicts privacy.unit = 'both'",
        ),
        (
            "[privacy]\nunit = 'example'\n[federation]\nnormalisation = 'federated'",
            "federation.normalisation = 'federated' contradicts privacy.unit = 'example'",
        ),
        (
            "[privacy]\nunit = 'example'\n[federation]\nstrategy = 'QFedAvg'",
            "federation.strategy = 'QFedAvg' contradicts privacy.unit = 'example'",
        ),
        (
            "[privacy]\nunit = 'client'\n[federation]\nevaluate_cohort = 2\nholdout = 0.1",
            "privacy.unit = 'client': noise covers one example of a client's metrics, and not the",
        ),
        (
            "[privacy]\nunit = 'both'\n[federation]\nnormalisation = 'federated'",
            "privacy.unit = 'both': exact sums of examples would leave each device without noise",
        ),
        (
            "[privacy]\nunit = 'client'\n[federation]\nstrategy = 'Krum'",
            "federation.strategy = 'Krum' contradicts privacy.unit = 'client': noise is added to",
        ),
        (
            "[privacy]\nunit = 'client'\n[federation]\nover_selection = 1.3\ncohort = 3",
            "federation.over_selection = 1.3 contradicts privacy.unit = 'client'",
        ),
        (
            "[privacy]\nunit = 'client'\n[privacy.client]\nclip_norm = 'adaptive'\n"
            "mechanism = 'matrix'",
            "privacy.client.clip_norm = 'adaptive' contradicts privacy.client.mechanism = 'matrix'",
        ),
        (
            "[privacy]\nunit = 'client'\n[privacy.client]\nseparation = 3",
            "privacy.client.separation = 3 contradicts privacy.client.mechanism = 'gaussian'",
        ),
        ("[federation]\nevaluate_cohort = 2", "evaluate_cohort needs federation.holdout above 0"),
        ("[federation]\nholdout = 0.1", "federation.holdout = 0.1 withholds data from training"),
        (
            "[federation]\nholdout_by = 'clients'",
            "federation.holdout_by = 'clients' needs federation.holdout above 0",
        ),
        (
            "[federation]\nholdout_by = 'clients'\nholdout = 0.2\nevaluate_cohort = 9\n"
            "[client]\nlocal = ['head.*']",
            "federation.holdout_by = 'clients' contradicts client.local",
        ),
        (
            "[federation]\nover_selection = 1.3",
            "federation.over_selection = 1.3 needs federation.cohort",
        ),
        (
            "[federation]\nrounds = 3\n[privacy]\nparticipations = 4",
            "privacy.participations = 4 is more than federation.rounds = 3",
        ),
        ("[client]\nnesterov = true", "client.nesterov = true needs client.optimizer = 'sgd' with"),
        (
            "[finetune]\nnesterov = true\noptimizer = 'adamw'",
            "finetune.nesterov = true needs finetune.optimizer = 'sgd'",
        ),
        (
            "[client]\nmomentum = 0.5\noptimizer = 'adam'",
            "client.momentum = 0.5 contradicts client.optimizer = 'adam', which has moments of",
        ),
        (
            "[finetune]\nmomentum = 0.5\noptimizer = 'adamw'",
            "finetune.momentum = 0.5 contradicts finetune.optimizer = 'adamw'",
        ),
        (
            "[client]\nmax_grad_norm = 1.0\n[privacy]\nunit = 'example'",
            "client.max_grad_norm = 1 contradicts example-level privacy: DP-SGD bounds each",
        ),
        ("[compression]\ncandidates = ['pruned']", "compression.candidates must contain 'fp32'"),
        ("[compression]\ncandidates = ['fp32', 'fp32']", "lists a candidate twice"),
        ("[release]\nkeys = 'keys'", "release.repository and release.keys must be set together"),
        ("[release]\nrepository = 'r'", "release.repository and release.keys must be set together"),
        ("[release]\npush = 's3://b/p'", "release.push needs release.repository"),
        (
            "[release]\nrepository = 'r'\nkeys = 'k'\npush = 's3://me:pw@b/p'",
            "release.push: The address of a bucket has an @",
        ),
        (
            "[release]\nrepository = 'r'\nkeys = 'k'\npush = 'releases'",
            "release.push: The address of a bucket: expected one",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path}/run.toml: ")
    assert said in message


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("federation.rounds=5", "federation.rounds", 5),
        (" federation.rounds = 5 ", "federation.rounds", 5),
        ("client.learning_rate=1e-3", "client.learning_rate", 0.001),
        ("privacy.unit=example", "privacy.unit", "example"),
        ('privacy.unit="example"', "privacy.unit", "example"),
        ("name=other", "name", "other"),
        ("federation.initial=a b=c.safetensors", "federation.initial", "a b=c.safetensors"),
        ('compression.candidates=["fp32", "pruned"]', "compression.candidates", ("fp32", "pruned")),
        ("client={epochs = 3}", "client.epochs", 3),
    ],
)
def test_an_override_sets_one_key(tmp_path: Path, override: str, key: str, value: object) -> None:
    found: object = load_run(written(tmp_path, REQUIRED), [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_is_put_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, REQUIRED + "[federation]\nrounds = 1\ncohort = 9\n")
    run = load_run(path, ["federation.rounds=2", "federation.rounds=3"])
    assert (run.federation.rounds, run.federation.cohort) == (3, 9)


@pytest.mark.parametrize("override", ["federation.rounds", "=3", ".rounds=3", "federation.=3", ""])
def test_an_override_that_is_none_is_refused_with_an_example(tmp_path: Path, override: str) -> None:
    said = refused(tmp_path, "", override)
    assert said.startswith(f"--set {override}: expected section.key=value, for example --set ")


def test_a_wrong_override_is_named_and_not_the_file(tmp_path: Path) -> None:
    said = refused(tmp_path, "[federation]\nrounds = 1", "seed=1", "federation.rounds=many")
    assert said.startswith("--set federation.rounds=many: federation.rounds = 'many': it should be")
    assert refused(tmp_path, "", "client.epoch=3").startswith("--set client.epoch=3: unknown key")
    assert refused(tmp_path, "", "name.x=3").startswith("--set name.x=3: unknown key 'name.x'")
    assert refused(tmp_path, "", "base=/").startswith("--set base=/: unknown key 'base'")


def test_a_wrong_file_is_named_and_not_the_override(tmp_path: Path) -> None:
    said = refused(tmp_path, "[federation]\nrounds = 0", "federation.cohort=3")
    assert said.startswith(f"{tmp_path}/run.toml: federation.rounds = 0")


def test_a_contradiction_names_the_file_and_what_was_put_over_it(tmp_path: Path) -> None:
    said = refused(tmp_path, "", "federation.holdout=0.2")
    assert said.startswith(f"{tmp_path}/run.toml --set federation.holdout=0.2: federation.holdout")


def test_one_override_cannot_smuggle_in_a_second_key(tmp_path: Path) -> None:
    assert "federation.rounds = '1\\n" in refused(tmp_path, "", "federation.rounds=1\ncohort=2")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[client\n", "Expected ']' at the end of a table declaration"),
        (b"[client]\nepochs = 1\nepochs = 2\n", "Cannot overwrite a value (at line 3"),
        (b"[client]\n[client]\n", "Cannot declare ('client',) twice"),
        (b'name = "\xff"\n', "can't decode byte 0xff in position 8"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_toml_is_refused_with_the_place(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith(f"{path}: not valid TOML: ")
    assert said in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: this file does not exist.*`fedcore new"):
        load_run(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="it is a folder or another kind of file"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match="File name too long"):
        load_run(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match="has 1048577 bytes, more than the 1048576 allowed"):
        load_run(written(tmp_path, "#" * ((1 << 20) + 1)))


def test_an_owners_file_is_read_with_the_same_care(tmp_path: Path) -> None:
    path = tmp_path / "owner.toml"
    path.write_text("max_epsilon = 2.0\n")
    assert load_owner(path).max_epsilon == 2.0
    path.write_text("max_epsilom = 2.0\n")
    with pytest.raises(ConfigError, match=r"owner\.toml: unknown key 'max_epsilom'.*'max_epsilon'"):
        load_owner(path)
    path.write_text("max_epsilon = 0.0\n")
    with pytest.raises(
        ConfigError, match=r"max_epsilon = 0\.0: it should be greater than or equal to 0\.01"
    ):
        load_owner(path)
    with pytest.raises(ConfigError) as caught:
        load_owner(tmp_path / "none.toml")
    assert "fedcore new" not in str(caught.value)


def test_a_run_is_frozen(tmp_path: Path) -> None:
    run = load_run(written(tmp_path, REQUIRED))
    with pytest.raises(ValueError, match="frozen"):
        run.federation.rounds = 3
    assert run == RunConfig(name="digits", task="task.py", base=tmp_path.resolve())
