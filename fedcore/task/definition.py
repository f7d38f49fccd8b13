"""The user's `Task`: a model, the clients' data, a loss and metrics.

`load_task` imports one from a Python file.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedcore.errors import DataError, FedcoreError, TaskError
from fedcore.files import sha256_hex
from fedcore.rpc.hello import is_task_name
from fedcore.seeds import global_streams
from fedcore.task.kinds.conform import TargetRule, shape_safe
from fedcore.task.kinds.probe import Probed, cannot_learn, learns_badly, probe
from fedcore.task.kinds.protocol import Kind, OutputForm, TargetOptions
from fedcore.task.kinds.protocol import Loss as Loss
from fedcore.task.kinds.registry import KindName, kind_of
from fedcore.task.kinds.settings import check_options, check_outputs
from fedcore.task.kinds.several import SeveralOutputs
from fedcore.task.metrics import Metric, check_metrics
from fedcore.task.named import NamedBefore, NamedInputs, NamedModel, load_with
from fedcore.task.named_outputs import (
    SeveralModel,
    TargetsLoader,
    loss_of,
    metric_of,
    several_outputs,
)
from fedcore.task.reading import Examples as Examples
from fedcore.task.reading import Folder as Folder
from fedcore.task.reading import data_folder as data_folder
from fedcore.task.reading import read_examples as read_examples
from fedcore.task.reading import require_folder as require_folder
from fedcore.task.reading import size_of as size_of
from fedcore.task.reading import told
from fedcore.task.reading import without_folder as without_folder

_LOADERS = ("client_data", "cloud_data", "cloud_heldout", "test_data", "client_test")
Part = Literal["heldout", "test", "all"]
"""Which of a client's examples: held back from training (``federation.holdout``), the task's
``client_test``, or all of ``client_data``."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A learning problem over data that lives on many clients.

    Functions that read data receive a folder: on a device the one that its owner sets, on a server
    and in a simulation the environment variable ``FEDCORE_DATA``; ``None`` when neither is set.
    Examples are pairs ``(input, target)`` of tensors.

    Example::

        task = Task(
            name="digits",
            kind="classification",
            model=lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
            clients=lambda folder: ["anna", "ben"],
            client_data=lambda client, folder: load(folder, client),
            test_data=lambda folder: load(folder, "test"),
            example_input=torch.zeros(64),
        )
    """

    name: str
    """1 to 64 of ``A-Za-z0-9._-``; devices and the server send it to each other."""
    kind: KindName | Kind | Mapping[str, KindName | Kind]
    """What outputs and targets mean; it decides loss and metrics, and how devices answer.
    ``classification``: outputs ``(B, C)``, targets ``(B,)`` of class numbers.
    ``binary``: outputs ``(B,)`` or ``(B, 1)``, the logit of 1; targets ``(B,)`` of 0 and 1.
    ``multilabel``: outputs and targets ``(B, L)``, 0 or 1 for each label.
    ``regression``: outputs and targets ``(B,)`` or ``(B, K)``.
    ``segmentation``: outputs ``(B, C, ...)``, targets ``(B, ...)`` of class numbers.
    ``next_token``: outputs ``(B, T, V)``, targets ``(B, T)`` of token numbers.
    ``sequence``: outputs ``(B, T, C)``, targets ``(B, T)`` of class numbers, -100 for none.
    Or an object of your own subclass of `fedcore.Kind`. Or a kind for each of several outputs by
    name, where the model returns a dictionary of them, and targets are dictionaries."""
    model: Callable[[], nn.Module]
    """Builds the model; initial weights come from torch's default generator, which is seeded. Where
    it gives an object or a dict with ``logits``, or a tuple, those or its first entry count."""
    clients: Callable[[Folder], Sequence[str]]
    """Returns the names of all clients. Only a simulation calls it."""
    client_data: Callable[[str, Folder], Examples]
    """Returns the examples of one client."""
    example_input: Tensor
    """One input, without the batch dimension; a dictionary of tensors where examples are pairs
    ``({"image": x, "age": a}, target)``. It is kept as one vector then, see ``named_inputs``, and
    model and preprocessing receive the dictionary."""
    named_inputs: NamedInputs | None = None
    """Names and shapes of the inputs; set from an ``example_input`` that is a dictionary."""
    test_data: Callable[[Folder], Examples] | None = None
    """Returns the final test split, if the server has one. It is read once, at the end; it decides
    only whether the result is published."""
    client_test: Callable[[str, Folder], Examples] | None = None
    """Returns the test split of one client, which no training reads: the final test where the
    server has no ``test_data``, and results by client in any case."""
    cloud_data: Callable[[Folder], Examples] | None = None
    """Returns data that the cloud may use for fine-tuning, its gate, pruning and calibration."""
    cloud_heldout: Callable[[Folder], Examples] | None = None
    """Returns cloud data for evaluation only. Set it if a random share of ``cloud_data`` is too
    similar to the rest: use other people, other machines or later days."""
    preprocess: Callable[[], nn.Module] | None = None
    """Builds a module without parameters that runs before the model and is exported with it."""
    labels: tuple[str, ...] = ()
    """Names of the classes; the released model contains them. Of several outputs, a dictionary of
    the names of each that has classes."""
    loss: Loss | None = None
    """Mean loss over a batch, ``(outputs, targets)``; the kind's usual one when unset. With several
    outputs both are dictionaries, for the metrics, too."""
    metrics: tuple[Metric, ...] = ()
    """The first is the primary one; the kind's usual ones when unset."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in the kind's usual loss, for rare classes; in ``multilabel`` the weight
    of each label's ones. A batch's loss is divided by the number of its examples, not by the sum of
    their weights, so that no example's share depends on the others."""
    ignore_index: int | None = None
    """Targets of this value count in neither loss nor metrics."""
    label_smoothing: float = 0.0
    """Share of each target's probability that the kind's usual loss spreads evenly, below 1."""
    student: Callable[[], nn.Module] | None = None
    """Builds a smaller network with the inputs and outputs of ``model``, which the compression
    candidates ``distilled`` and ``distilled_int8`` teach its answers."""

    def __post_init__(self) -> None:
        if not is_task_name(self.name):
            raise TaskError(
                f"task {self.name!r}: a task's name is 1 to 64 of the letters A-Z and a-z, "
                "digits, '.', '_' and '-', because devices and the server exchange it. Nothing "
                "was run; choose another name in the task file."
            )
        self._unwrap_outputs()
        self._name_inputs()
        self._name_outputs()
        kind, options = self.problem, self.options
        loss = kind.loss(options)
        own_loss = self.loss is not None and self.loss != loss  # a copy states the usual one
        check_options(kind, options, task=self.name, own_loss=own_loss)
        object.__setattr__(self, "loss", self.loss or loss)
        usual = kind.metrics(options)
        own = tuple(self.metrics or ())
        check_metrics(own, task=self.name)
        if own and kind.presentation == "values" and not isinstance(kind, SeveralOutputs):
            own = tuple(one if one in usual else shape_safe(one) for one in own)
        object.__setattr__(self, "metrics", own or usual)
        missing = [name for name in ("loss", "metrics") if not getattr(self, name)]
        if missing:
            raise TaskError(
                f"task {self.name!r}: its kind {kind.name!r} has no usual {' or '.join(missing)}. "
                f"Nothing was run; state {' and '.join(missing)} in the task or in the kind."
            )

    def _name_inputs(self) -> None:
        """Turns named inputs into vectors: the example, the loaders, and what the model takes."""
        example: Any = self.example_input
        if isinstance(example, Mapping):
            named = NamedInputs.of(example, task=self.name)
            object.__setattr__(self, "named_inputs", named)
            object.__setattr__(self, "example_input", named.vector(example))
        elif not isinstance(example, Tensor):
            raise TaskError(
                f"task {self.name!r}: example_input is a {type(example).__name__}, expected a "
                "tensor, or a dictionary of tensors by name. Nothing was run; correct it."
            )
        inputs = self.named_inputs
        if inputs is None:
            return
        for field in _LOADERS:
            object.__setattr__(self, field, load_with(getattr(self, field), inputs))
        vector = self.example_input
        if self.preprocess is not None and not isinstance(self.preprocess, NamedBefore):
            before = NamedBefore(self.preprocess, inputs, vector, self.name)
            object.__setattr__(self, "preprocess", before)
        build = self.model.build if isinstance(self.model, NamedModel) else self.model
        object.__setattr__(self, "model", NamedModel(build, inputs, self.preprocess, vector))
        if self.student is not None and not isinstance(self.student, NamedModel):
            student = NamedModel(self.student, inputs, self.preprocess, vector)
            object.__setattr__(self, "student", student)

    def _unwrap_outputs(self) -> None:
        """Takes from a copy of a task what `_name_outputs` has made."""
        for field in (*_LOADERS, "model", "student"):
            given = getattr(self, field)
            if isinstance(given, TargetsLoader | SeveralModel):
                object.__setattr__(self, field, given.inner)

    def _name_outputs(self) -> None:
        """Turns several outputs and their targets into vectors, if there are several."""
        if isinstance(self.kind, Mapping):
            kinds = {name: kind_of(each, task=self.name) for name, each in self.kind.items()}
            labels: Any = self.labels or {}
            made = several_outputs(
                kinds, labels, self.model, self.preprocess, self.example_input, task=self.name
            )
            object.__setattr__(self, "kind", made)
            object.__setattr__(self, "labels", ())
        kind = self.kind
        if not isinstance(kind, SeveralOutputs):
            return
        for field in _LOADERS:
            if (load := getattr(self, field)) is not None:
                object.__setattr__(self, field, TargetsLoader(load, kind))
        object.__setattr__(self, "model", SeveralModel(self.model, kind))
        if self.student is not None:
            object.__setattr__(self, "student", SeveralModel(self.student, kind))
        object.__setattr__(self, "loss", loss_of(self.loss, kind))
        metrics = tuple(metric_of(each, kind) for each in self.metrics or ())
        object.__setattr__(self, "metrics", metrics)

    @property
    def problem(self) -> Kind:
        """The kind of problem, as an object."""
        assert not isinstance(self.kind, Mapping)  # __post_init__ makes one kind of them
        return kind_of(self.kind, task=self.name)

    @property
    def options(self) -> TargetOptions:
        """The settings for targets."""
        try:
            weights = tuple(float(one) for one in self.class_weights or ())
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"task {self.name!r}: class_weights are {self.class_weights!r}, expected one "
                "number for each class. Nothing was run; correct the task file."
            ) from error
        return TargetOptions(weights, self.ignore_index, self.label_smoothing)

    @cached_property
    def _probe(self) -> Probed | BaseException | None:
        """What a fresh model makes of ``example_input``, or the error that it raises."""
        try:
            with warnings.catch_warnings(), global_streams(0, "outputs"):
                warnings.simplefilter("ignore")
                model = self.model()
                before = self.preprocess() if self.preprocess else nn.Identity()
                return probe(before, model, torch.stack([self.example_input] * 2))
        except (Exception, SystemExit) as error:  # the task's code may raise anything
            return error.with_traceback(None)  # it would keep the model

    @property
    def probed(self) -> Probed | None:
        """What a fresh model makes of ``example_input``; None if it cannot answer it."""
        return self._probe if isinstance(self._probe, Probed) else None

    @property
    def outputs(self) -> OutputForm | None:
        """Form of the model's outputs for one input; None if they are not known."""
        return self.probed.form if self.probed is not None else None

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is another than the kind's usual one."""
        return self.loss != self.problem.loss(self.options)

    def check_model(self) -> str:
        """Checks that the model's outputs are of the task's kind and can be trained.

        Returns:
            Why it would learn badly, as a sentence; else empty.

        Raises:
            TaskError: the model fails on ``example_input``, or the outputs are not of the kind,
                carry no gradient, or differ in number from labels or class weights.
        """
        if isinstance(self._probe, BaseException):
            error, example = self._probe, self.example_input
            raise TaskError(
                f"task {self.name!r}: its model fails on example_input, {example.dtype} "
                f"{tuple(example.shape)}: {type(error).__name__}: {error}. Nothing was trained; "
                "make example_input one input of the model, without the batch dimension, of a "
                "dtype that the model takes: data are converted to it."
            )
        if self.probed is None:
            return ""
        problem, form = self.problem, self.probed.form
        stuck = cannot_learn(self.probed)
        if stuck:
            raise TaskError(f"task {self.name!r}: its model's {stuck}. Nothing was trained.")
        check_outputs(problem, self.options, form, task=self.name, labels=self.labels)
        return learns_badly(problem, self.probed, own_loss=self.has_own_loss)

    @cached_property
    def targets(self) -> TargetRule:
        """How targets are brought to the form that the loss takes."""
        several = isinstance(self.problem, SeveralOutputs)  # they know the form of each target
        own_loss = self.loss if self.has_own_loss and not several else None
        return TargetRule(self.problem, self.options, self.outputs, own_loss)

    @property
    def primary(self) -> Metric:
        """The metric that decisions use."""
        return self.metrics[0]

    @property
    def loss_of(self) -> Loss:
        """The mean loss over a batch: ``loss_of(outputs, targets)`` is a scalar."""
        assert self.loss is not None  # set in __post_init__
        return self.loss


def load_task(path: Path) -> Task:
    """Imports a task file and returns its ``task``.

    The file can import modules from its own folder while it loads, as a Python script can.

    Example::

        task = fedcore.load_task(Path("churn/task.py"))
        model = task.model()

    Raises:
            TaskError: the file does not exist, fails to import, or has no `Task` named ``task``.
    """
    path = path.resolve()
    if not path.is_file():
        wrong = "is not a regular file" if path.exists() else "does not exist"
        raise TaskError(
            f"{path}: this task file {wrong}. Nothing was run; give the path of an existing one: "
            "as `task` in the run's file, or with --task on a device."
        )
    name = f"fedcore_task_{sha256_hex(str(path).encode())[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path}: a task file ends in .py. Nothing was run.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a model class defined there must be importable by its name
    sys.path.insert(0, str(path.parent))
    task = None
    try:
        spec.loader.exec_module(module)
        task = getattr(module, "task", None)
    except FedcoreError:
        raise
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise TaskError(
            f"{path}: importing this task failed: {type(error).__name__}: {error}. Nothing was "
            "run; run `python` on the file to see where."
        ) from error
    finally:
        sys.path.remove(str(path.parent))
        if not isinstance(task, Task):
            del sys.modules[name]
    if not isinstance(task, Task):
        raise TaskError(
            f"{path}: expected a variable `task` that is a fedcore.Task, found "
            f"{'nothing of that name' if task is None else type(task).__name__}. Nothing was run."
        )
    return task


def check_inputs(task: Task, examples: Examples, *, what: str) -> None:
    """Checks that a data set's inputs have the shape and dtype of the task's ``example_input``.

    Raises:
        TaskError: shape or dtype differ; the exported model would accept only the example's.
        DataError: the first example cannot be read.
    """
    try:
        inputs, _ = examples[0]
    except FedcoreError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(
            f"{what}: reading its first example failed: {told(error)}. Nothing "
            "was trained; each example must be a pair (input, target)."
        ) from error
    example = task.example_input
    if inputs.shape != example.shape or inputs.dtype != example.dtype:
        raise TaskError(
            f"{what}: inputs are {inputs.dtype} {tuple(inputs.shape)}, but example_input of task "
            f"{task.name!r} is {example.dtype} {tuple(example.shape)}: the exported model would "
            "refuse them. Nothing was trained; give both the same type and shape."
        )
