"""Steps that look at data: the clients', the cloud's and the test splits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import TensorDataset

from fedcore.errors import FedcoreError, TaskError
from fedcore.observability.words import counted
from fedcore.seeds import derive, torch_rng
from fedcore.task.definition import Examples, Folder, read_examples, size_of
from fedcore.task.missing import missing_allowed
from fedcore.task.model import build_model
from fedcore.training.batches import split
from fedcore.training.examples import canonical, task_examples
from fedcore.training.roles import is_judge
from fedcore.updates.pack import layout_of
from server.checking.clients import look_at_clients
from server.checking.looking import DataFault, Expected, look_at
from server.checking.progress import StepProgress
from server.checking.selection import chosen_places
from server.checking.state import CLOUD, SYNTHETIC, TEST, CheckState, Fault, StepOutcome, few
from server.preflight import clients_of
from server.release.named import describable

TRAINED = 6
"""Clients whose training is rehearsed."""


def name_clients(state: CheckState) -> StepOutcome:
    """Lists the clients, and chooses those whose rows are all looked at."""
    if state.place == "server":
        return StepOutcome("not checked: a server has no clients' data")
    if state.place == "device":
        names = state.asked
        if isinstance(names, str | int) or not names or len(names) != 1:
            raise TaskError("on a device, give the one client whose data are here with --clients.")
        state.names, state.chosen = list(names), [0]
        judging = ""
        if is_judge(state.run.federation, names[0]):
            judging = ", which evaluates models and never trains (federation.holdout_by)"
        return StepOutcome(
            f"{names[0]!r}{judging}, whose data are on this device; others not checked"
        )
    state.names = clients_of(state.task, state.run, state.folder)
    state.chosen = chosen_places(state.names, state.asked, seed=state.run.seed)
    judging, federation = "", state.run.federation
    if federation.has_judges:  # a task may have millions
        judges = sum(is_judge(federation, name) for name in state.names)
        judging = f", of whom {judges:,} judge and never train"
    return StepOutcome(f"{counted(len(state.names), 'client', ',')}{judging}")


def make_model(state: CheckState) -> StepOutcome:
    """Builds the model, and tries it on the example input."""
    if state.run.release.repository is not None:
        describable(state.task)
    state.built = build_model(state.task, state.run)
    example = state.task.example_input
    outputs = _answers(state, torch.stack([example] * 2))
    if not isinstance(outputs, torch.Tensor) or outputs.shape[:1] != (2,):
        got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise TaskError(
            f"for 2 inputs the model returns {got}, expected one tensor with 2 rows: return the "
            "outputs alone, one row for each input."
        )
    doubt = state.task.check_model()
    state.output_shape = outputs.shape[1:]
    missing = missing_allowed(state.model, example, state.task.named_inputs)
    state.wanted = Expected(state.task, missing)
    count = sum(p.numel() for p in state.model.parameters())
    sent = layout_of(state.model.model).size
    text = f"{count:,} parameters, {sent * 4 / 1e6:,.2f} MB an update; outputs "
    text += f"{tuple(outputs.shape[1:])} for inputs {example.dtype} {tuple(example.shape)}"
    if missing.any():
        where = "everywhere" if missing.all() else f"at {int(missing.sum())} positions"
        text += f"; takes NaN {where}"
    badly = DataFault("outputs", None, doubt, required=False)
    return StepOutcome(text, [Fault(None, badly)] if doubt else [])


def _answers(state: CheckState, inputs: torch.Tensor) -> torch.Tensor:
    """Returns the model's outputs for inputs like ``example_input``."""
    try:
        return state.outputs(inputs)
    except FedcoreError:
        raise
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        raise TaskError(
            f"the model fails on 2 inputs like example_input, which is {inputs.dtype} "
            f"{tuple(inputs.shape[1:])}: {type(error).__name__}: {error}. Give example_input the "
            "shape and dtype that the model takes (float32 for most layers; data of other floats "
            "are converted), or convert it in preprocess."
        ) from error


def look_at_client_data(state: CheckState) -> StepOutcome:
    """Looks at the clients' rows, and chooses those whose training is rehearsed."""
    if state.place == "server":
        return StepOutcome("not checked: a server has no clients' data")
    looked = look_at_clients(
        state.task,
        state.folder,
        state.names,
        state.chosen,
        state.expected,
        accepts=state.outputs,
        only=state.asked is not None,
        progress=StepProgress("client data", state.tell),
    )
    state.sizes = looked.sizes
    faults = [Fault(one.client, one.fault) for one in looked.faults]
    for name in _to_train(state):
        state.trained_on[name] = _few(state, _read(state, name))
    return StepOutcome(looked.text, [*faults, *_small_batches(state)])


def _few(state: CheckState, examples: Examples) -> Examples:
    return few(examples, state.run.client.batch_size, outputs=state.output_shape)


def _read(state: CheckState, name: str) -> Examples:
    what = f"data of client {name!r}"
    load = partial(state.task.client_data, name, state.folder)
    return task_examples(state.task, load, what=what, folder=state.folder)


def _kept(state: CheckState, name: str) -> int:
    """Returns the number of a client's examples that training uses."""
    count, federation = state.sizes[name], state.run.federation
    holdout = 0.0 if federation.has_judges else federation.holdout
    return count - min(max(round(count * holdout), 1 if holdout else 0), max(count - 1, 0))


def _to_train(state: CheckState) -> list[str]:
    """Returns clients that differ in size: the first, the smallest, the largest, odd last ones."""
    chosen = [state.names[place] for place in state.chosen if state.names[place] in state.sizes]
    # A client that judges never trains, but its data must fit the model all the same.
    chosen = [name for name in chosen if not is_judge(state.run.federation, name)] or chosen
    if not chosen:
        return []
    by_size = sorted(chosen, key=state.sizes.__getitem__)
    odd = [name for name in chosen if _kept(state, name) % state.run.client.batch_size == 1]
    return list(dict.fromkeys([chosen[0], by_size[0], by_size[-1], *odd[:2], *chosen]))[:TRAINED]


def _small_batches(state: CheckState) -> list[Fault]:
    """Notes clients whose last batch has one example, where layers compute over a batch."""
    batch = state.run.client.batch_size
    layers = [
        name
        for name, module in state.model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    if not layers:
        return []
    found = []
    for name in state.sizes:
        if is_judge(state.run.federation, name):
            continue
        count = _kept(state, name)
        if count % batch == 1:
            text = (
                f"has 1 example to train on, and layer {layers[0]!r} needs two: it takes running "
                "statistics; give it more examples, or use GroupNorm"
                if count == 1
                else f"has {count:,} examples to train on, and the last of its batches of {batch} "
                f"has 1, where layer {layers[0]!r} needs two: it joins the batch before"
            )
            found.append(Fault(name, DataFault("last batch", None, text, required=False)))
    return found


def look_at_cloud_data(state: CheckState) -> StepOutcome:
    """Looks at every row of the cloud's data and of its held-out part."""
    task, loader = state.task, state.task.cloud_data
    if state.place == "device":
        return StepOutcome("not checked: a device has no cloud data")
    if loader is None:
        return StepOutcome(
            "none: fine-tuning, its gate and every candidate except fp32 are skipped"
        )
    examples, text, faults = _looked(state, "cloud data", loader)
    found = [text]
    state.cloud, state.cloud_heldout = split(
        examples, state.run.finetune.holdout, derive(state.run.seed, "cloud")
    )
    if task.cloud_heldout is not None:
        heldout, text, more = _looked(state, "held-out cloud data", task.cloud_heldout)
        found.append(f"{text} held out")
        faults += more
        state.cloud, state.cloud_heldout = examples, heldout
    if not state.trained_on:
        state.trained_on[CLOUD] = _few(state, state.cloud)
    return StepOutcome("; ".join(found), faults)


def look_at_test_data(state: CheckState) -> StepOutcome:
    """Looks at every row of the server's test data, and of the test data of some clients."""
    task = state.task
    found, faults = list[str](), list[Fault]()
    if state.place == "device":
        found.append("not checked: the server's test data")
    elif task.test_data is not None:
        state.test, text, more = _looked(state, "test data", task.test_data)
        found.append(text)
        faults += more
    if state.place == "server" and not state.trained_on:
        state.trained_on[SYNTHETIC if state.test is None else TEST] = _few(
            state, _synthetic(state) if state.test is None else state.test
        )
    own = task.client_test
    if own is not None and state.place != "server":
        progress = StepProgress("clients' test data", state.tell)
        count, seen = 0, [state.names[place] for place in state.chosen]
        for done, name in enumerate(seen):
            progress(done, len(seen))
            load = partial(own, name)
            examples, _, more = _looked(
                state, f"test data of client {name!r}", load, least=0, client=name
            )
            faults += more
            count += size_of(examples)
        who = f"client {seen[0]!r}" if len(seen) == 1 else counted(len(seen), "client", ",")
        found.append(f"{counted(count, 'example', ',') if count else 'no examples'} of {who}")
    return StepOutcome(
        "; ".join(found) or "none: no final test can show whether the result is worse", faults
    )


def _synthetic(state: CheckState) -> Examples:
    """Returns copies of the example input with targets that fit, where there are no data at all."""
    inputs = torch.stack([state.task.example_input] * 8)
    rng = torch_rng(state.run.seed, "check")
    targets = next(iter(state.task.problem.synthetic(state.outputs(inputs), rng)))
    made: Examples = TensorDataset(inputs, targets)  # type: ignore[assignment]
    return made


def _looked(
    state: CheckState,
    what: str,
    loader: Callable[[Folder], Examples],
    *,
    least: int = 1,
    client: str | None = None,
) -> tuple[Examples, str, list[Fault]]:
    """Reads a data set and looks at every row; returns it, its size as text, and its faults."""
    folder = state.folder
    examples = read_examples(lambda: loader(folder), what=what, least=least, folder=folder)
    count = size_of(examples)
    progress, done = StepProgress(what, state.tell), 0

    def more() -> bool:
        nonlocal done
        progress(min(done, count), count)
        done += 1  # a row of data that are read one by one; else a block, which takes no time
        return True

    try:
        looked = look_at(examples, state.expected, rows=range(count), more=more)
    except FedcoreError as error:
        return examples, "", [Fault(client, DataFault("unreadable", None, f"{what}: {error}"))]
    faults = [
        Fault(client, DataFault(one.kind, one.row, f"{what}, {one.text}", one.column, one.required))
        for one in looked.faults
    ]
    usable = canonical(state.task, examples, what=what)
    return usable, counted(count, "example", ","), faults
