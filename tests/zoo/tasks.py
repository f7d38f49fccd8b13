"""The zoo: tiny tasks, most of them odd in one way, and what `fedcore.check` says of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.metrics import AUC
from tests.zoo import models as m

Draw = Callable[[int, torch.Generator], Tensor]
Label = Callable[[Tensor, torch.Generator], Any]
SIZES = {"anna": 12, "ben": 9, "carla": 5}  # batches of four: two end in a batch of one
ONE_ROW = {"anna": 12, "ben": 1, "carla": 5}

EXAMPLE = {"privacy": {"unit": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}}
CLIENT = {
    "privacy": {
        "unit": "client",
        "client": {"noise_multiplier": 1.0, "target_delta": 1e-2, "max_epsilon": 100.0},
    },
    "federation": {"cohort": 2},
}
VECTORISED = {"simulation": {"training": "vectorised"}}


@dataclass(frozen=True)
class Case:
    """A task with a run's settings, and what becomes of it."""

    name: str
    task: Callable[[], fedcore.Task]
    remedy: str = ""
    """A pattern in the refusal, for what to do; empty where the task is ready."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Sections of the run that differ from the zoo's."""


def numbers(*shape: int) -> Draw:
    return lambda count, rng: torch.randn(count, *shape, generator=rng)


FEATURES = numbers(m.FEATURES)


def tokens(largest: int = m.TOKENS) -> Draw:
    return lambda count, rng: torch.randint(largest, (count, m.STEPS), generator=rng)


def cast(draw: Draw, dtype: torch.dtype) -> Draw:
    return lambda count, rng: (draw(count, rng) * 50).abs().to(dtype)


def classes(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.arange(len(x)) % m.CLASSES


def signs(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.arange(len(x)) % 2


def sums(x: Tensor, rng: torch.Generator) -> Tensor:
    return x.flatten(1).sum(dim=1)


def whole(label: Label, dtype: torch.dtype) -> Label:
    """The same targets in another dtype."""
    return lambda x, rng: label(x, rng).to(dtype)


def cells(*shape: int, classes: int = m.CLASSES) -> Label:
    return lambda x, rng: torch.randint(classes, (len(x), *shape), generator=rng)


def made(
    name: str,
    kind: Any = "classification",
    model: m.Build = m.mlp,
    inputs: Draw = FEATURES,
    targets: Label = classes,
    *,
    sizes: Mapping[str, int] = SIZES,
    data: Callable[[str, int, torch.Generator], Any] | None = None,
    **more: Any,
) -> Callable[[], fedcore.Task]:
    def examples(who: str, count: int) -> Any:
        rng = torch.Generator().manual_seed(sum(map(ord, who)))
        if data is not None:
            return data(who, count, rng)
        drawn = inputs(count, rng)
        return TensorDataset(drawn, targets(drawn, rng))

    def build() -> fedcore.Task:
        given: dict[str, Any] = {
            "name": name.replace(" ", "-"),
            "kind": kind,
            "model": model,
            "clients": lambda folder: list(sizes),
            "client_data": lambda client, folder: examples(client, sizes[client]),
            "cloud_data": lambda folder: examples("cloud", 24),
            "test_data": lambda folder: examples("test", 12),
            "example_input": inputs(1, torch.Generator().manual_seed(0))[0],
        }
        return fedcore.Task(**{**given, **more})

    return build


IMAGE, WINDOW, SIGNAL = numbers(1, 8, 8), numbers(m.STEPS, m.FEATURES), numbers(1, 32)


class Ranking(fedcore.Kind):
    """Scores of items, of which the first of two named ones is preferred."""

    name = "ranking"

    def loss(self, options: Any) -> Any:
        def pairwise(outputs: Tensor, targets: Tensor) -> Tensor:
            preferred, other = outputs.gather(1, targets).unbind(1)
            return -nn.functional.logsigmoid(preferred - other).mean()

        return pairwise

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        yield torch.stack([torch.randperm(outputs.shape[1], generator=rng)[:2] for _ in outputs])


def hits(outputs: Tensor, targets: Tensor) -> float:
    preferred, other = outputs.gather(1, targets).unbind(1)
    return (preferred > other).double().mean().item()


def pairs(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(m.CLASSES, generator=rng)[:2] for _ in x])


HITS = fedcore.Metric("hits", hits, higher_is_better=True, low=0.0, high=1.0)


ZEROS = torch.zeros(m.FEATURES)
WORDS = cells(m.STEPS, classes=m.TOKENS)


def column(x: Tensor, rng: torch.Generator) -> Tensor:
    return classes(x, rng).double()[:, None]


def one_hot(x: Tensor, rng: torch.Generator) -> Tensor:
    return nn.functional.one_hot(classes(x, rng), m.CLASSES)


def ignored(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.where(signs(x, rng) > 0, classes(x, rng), -1)


def tags(x: Tensor, rng: torch.Generator) -> Tensor:
    found = torch.randint(m.CLASSES, (len(x), m.STEPS), generator=rng)
    found[:, -1] = -100
    return found


def masked(x: Tensor, rng: torch.Generator) -> Tensor:
    return cells(8, 8)(x, rng).masked_fill(x[:, 0] > 1, 255)


def holes(count: int, rng: torch.Generator) -> Tensor:
    found = FEATURES(count, rng)
    return found.masked_fill(found > 1.0, float("nan"))


def skewed(count: int, rng: torch.Generator) -> Tensor:
    return FEATURES(count, rng).mul(3).exp()


def listed(who: str, count: int, rng: torch.Generator) -> Any:
    """A list of pairs, whose targets are Python's ints."""
    return [(torch.randn(m.STEPS, m.FEATURES, generator=rng), i % m.CLASSES) for i in range(count)]


def one_class(who: str, count: int, rng: torch.Generator) -> TensorDataset:
    """Examples of which two clients have one class each."""
    x = torch.randn(count, m.FEATURES, generator=rng)
    alone = {"anna": False, "ben": True}.get(who)
    found = signs(x, rng).bool() if alone is None else torch.full((count,), alone)
    return TensorDataset(x, found[:, None])


def own_test(client: str, folder: Any) -> TensorDataset:
    x = torch.randn(6, m.FEATURES, generator=torch.Generator().manual_seed(7))
    return TensorDataset(x, torch.arange(6) % m.CLASSES)


def _classifiers() -> Iterator[Case]:
    yield Case(
        "linear, int32 targets, no test data",
        made("linear", model=m.linear, targets=whole(classes, torch.int32), test_data=None),
    )
    yield Case(
        "dropout, a column of floats as targets, side by side",
        made("dropout", targets=column),
        run=VECTORISED,
    )
    yield Case(
        "batch norm without momentum, a client of one row, uint8 targets",
        made(
            "momentum",
            model=partial(m.normed_mlp, momentum=None),
            targets=whole(classes, torch.uint8),
            sizes=ONE_ROW,
        ),
    )
    yield Case("a pair of outputs", made("pair", model=m.Two))
    grey = cast(IMAGE, torch.uint8)
    groups = partial(m.cnn, m.group_norm)
    yield Case(
        "group norm, images of bytes, one-hot targets",
        made("groups", model=groups, inputs=grey, targets=one_hot, preprocess=m.Scaled),
    )
    yield Case(
        "batch norm, images of booleans, smoothed labels",
        made(
            "booleans",
            model=partial(m.cnn, nn.BatchNorm2d),
            inputs=cast(IMAGE, torch.bool),
            preprocess=m.Scaled,
            label_smoothing=0.1,
        ),
    )
    yield Case(
        "gru, float64 inputs",
        made(
            "gru",
            model=partial(m.Recurrent, nn.GRU),
            inputs=cast(WINDOW, torch.float64),
            example_input=torch.zeros(m.STEPS, m.FEATURES),
        ),
    )
    yield Case(
        "class token, a list of pairs, side by side",
        made("token", model=m.ClassToken, inputs=WINDOW, data=listed),
        run=VECTORISED,
    )
    yield Case(
        "embedding, int32 tokens, ignored targets",
        made(
            "bag",
            model=m.Bag,
            inputs=lambda count, rng: tokens()(count, rng).int(),
            targets=ignored,
            ignore_index=-1,
        ),
    )
    partly = partial(m.Backbone, frozen=True, unused=True)
    yield Case(
        "frozen and unused weights, neither cloud nor test data",
        made("frozen", model=partly, cloud_data=None, test_data=None),
    )
    yield Case(
        "integers that training changes, tests of clients alone",
        made("counting", model=m.Counting, test_data=None, client_test=own_test),
    )
    signal = numbers(32)
    head = partial(nn.Linear, 45, m.CLASSES)
    yield Case(
        "short-time spectrum", made("stft", model=head, inputs=signal, preprocess=m.Spectrum)
    )
    yield Case(
        "missing values that preprocess fills",
        made("filled", inputs=holes, preprocess=m.Filled, example_input=ZEROS),
    )


def _other_kinds() -> Iterator[Case]:
    one = partial(m.mlp, 1)
    yield Case(
        "binary, clients of one class, judged by AUC",
        made("auc", "binary", one, data=one_class, metrics=(AUC,)),
        run={"federation": {"evaluate_cohort": 3, "holdout": 0.4}},
    )
    yield Case(
        "multilabel, boolean targets",
        made("labels", "multilabel", targets=whole(cells(m.CLASSES, classes=2), torch.bool)),
    )
    yield Case(
        "regression, whole numbers in a column of outputs",
        made("whole", "regression", partial(m.conv1d, 1), SIGNAL, whole(sums, torch.int32)),
    )
    yield Case(
        "regression of two, skewed inputs",
        made(
            "two",
            "regression",
            partial(m.mlp, 2),
            skewed,
            lambda x, rng: x[:, :2].log().double(),
            preprocess=m.Log1p,
        ),
    )
    yield Case(
        "segmentation, masked pixels",
        made("pixels", "segmentation", m.pixels, IMAGE, masked, ignore_index=255),
    )
    tied = partial(m.Language, tied=True)
    yield Case("next token, tied weights", made("tied", "next_token", tied, tokens(), WORDS))
    many, next_ones = partial(m.Language, 2000), cells(m.STEPS, classes=2000)
    yield Case(
        "next token, large vocabulary",
        made("large", "next_token", many, tokens(2000), next_ones),
    )
    tagger = partial(m.Recurrent, nn.LSTM, every=True, both=True)
    yield Case("sequence, lstm both ways", made("tags", "sequence", tagger, WINDOW, tags))
    yield Case("a kind of the user's own", made("own", Ranking(), targets=pairs, metrics=(HITS,)))


def _private() -> Iterator[Case]:
    groups = partial(m.cnn, m.group_norm)
    lstm: dict[str, Any] = {"model": partial(m.Recurrent, nn.LSTM), "inputs": WINDOW}
    examples: list[tuple[str, Callable[[], fedcore.Task]]] = [
        ("lstm, class weights", made("lstm", **lstm, class_weights=(1.0, 2.0, 5.0))),
        ("pixels", made("pixels", "segmentation", m.pixels, IMAGE, cells(8, 8))),
        (
            "tied weights",
            made("tied", "next_token", partial(m.Language, tied=True), tokens(), WORDS),
        ),
        ("own kind", made("own", Ranking(), targets=pairs, metrics=(HITS,))),
    ]
    for name, task in examples:
        yield Case(f"private examples, {name}", task, run=EXAMPLE)
    constants = made("constants", model=m.Constants, sizes=ONE_ROW)
    clients: list[tuple[str, Callable[[], fedcore.Task]]] = [
        ("group norm", made("groups", model=groups, inputs=IMAGE)),
        ("batch norm", made("normed", model=m.normed_mlp)),
        ("integer constants, a client of one row", constants),
    ]
    for name, task in clients:
        yield Case(f"private clients, {name}", task, run=CLIENT)


def _refused_data() -> Iterator[Case]:
    def text(who: str, count: int, rng: torch.Generator) -> Any:
        return [(torch.randn(m.FEATURES, generator=rng), "cat") for i in range(count)]

    def images(who: str, count: int, rng: torch.Generator) -> Any:
        return [(torch.randn(1, 8 + i % 2, 8), i % m.CLASSES) for i in range(count)]

    yield Case("text targets", made("text", data=text), "put the names in the task's `labels`")
    beyond = made("beyond", targets=lambda x, rng: classes(x, rng) + 1)
    yield Case("classes numbered from 1", beyond, "subtract 1")
    below = made("below", targets=lambda x, rng: classes(x, rng) - 1)
    yield Case("classes below 0", below, "ignore_index=-1")
    yield Case("quantities as classes", made("sums", targets=sums), "kind='regression'")
    binary = made("values", "binary", partial(m.mlp, 1), targets=classes)
    yield Case("a third class in binary", binary, "0 or 1")
    nothing = made("nothing", targets=lambda x, rng: -torch.ones(len(x)), ignore_index=-1)
    yield Case("all targets ignored", nothing, "not all of them ignore_index")
    pixels = made("pixels", "segmentation", m.pixels, IMAGE, masked)
    yield Case("pixels out of range", pixels, "ignore_index")
    yield Case("missing values", made("holes", inputs=holes, example_input=ZEROS), "preprocess")
    two_sizes = made("sizes", model=m.pixels, inputs=IMAGE, data=images)
    yield Case("images of two sizes", two_sizes, "size")
    outside = made("tokens", model=m.Bag, inputs=tokens(2 * m.TOKENS))
    yield Case("tokens beyond the table", outside, "index")
    doubles = made("doubles", inputs=cast(FEATURES, torch.float64))
    yield Case("float64 for float32 weights", doubles, "float32 for most layers")
    empty = made("empty", sizes={"anna": 12, "ben": 0, "carla": 5})
    yield Case("an empty client", empty, "'ben'.*leave this client out")
    yield Case("no clients", made("nobody", sizes={}), "expected at least one")


def _refused_models() -> Iterator[Case]:
    without = partial(m.normed_mlp, track_running_stats=False)
    wide = partial(nn.Linear, m.FEATURES + 1, m.CLASSES)
    given: list[tuple[str, m.Build, str]] = [
        ("one output for classes", partial(m.mlp, 1), "kind='binary'"),
        ("branching on values", m.Branching, "without control flow"),
        ("a mean over the batch", m.OverBatch, "depends on the others of its batch"),
        ("batch norm without statistics", without, "BatchNorm with running statistics"),
        ("another width", wide, "the shape and dtype that the model takes"),
        ("fewer outputs than classes", partial(m.mlp, 2), "0 to 1"),
        ("nothing to train", nn.Flatten, "parameters"),
    ]
    for name, model, remedy in given:
        yield Case(name, made(name, model=model), remedy)
    normed, counting = made("normed", model=m.normed_mlp), made("counting", model=m.Counting)
    yield Case("batch norm side by side", normed, "use 'auto'", run=VECTORISED)
    yield Case("private examples, batch norm", normed, "GroupNorm", run=EXAMPLE)
    yield Case("private examples, counting", counting, "without such state", run=EXAMPLE)
    yield Case("private clients, counting", counting, "use layers without such state", run=CLIENT)


READY = (*_classifiers(), *_other_kinds(), *_private())
REFUSED = (*_refused_data(), *_refused_models())
