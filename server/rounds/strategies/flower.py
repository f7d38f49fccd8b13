"""Strategy of a run, one of Flower's or the user's own, and whether it folds updates on arrival."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import flwr.serverapp.strategy as flower
from flwr.serverapp.strategy import Strategy

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.privacy.unsound import SUMMED
from fedcore.task.algorithm import Algorithm
from fedcore.updates.messages import ARRAYS, CONFIG, NUM_EXAMPLES
from server.rounds.strategies.algorithm import AlgorithmStrategy
from server.rounds.strategies.checked import CheckedAlgorithm
from server.rounds.strategies.feddf import FEDDF, Distil, Distillation, FedDF
from server.rounds.strategies.own import UserStrategy, names_user_strategy, user_strategy

FOLDING = (
    flower.FedAvg,
    flower.FedProx,
    flower.FedAvgM,
    flower.FedAdagrad,
    flower.FedAdam,
    flower.FedYogi,
)
"""Strategies whose result depends only on the weighted mean of the updates."""
_MEANS = (flower.FedAvg, flower.FedProx)
"""Strategies whose result is the weighted mean of the updates."""
_TREES = (flower.FedXgbBagging, flower.FedXgbCyclic)
_CLIENT_DP = (
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyServerSideFixedClipping,
)
_RESERVED_OPTIONS = {
    "fraction_train",
    "fraction_evaluate",
    "min_train_nodes",
    "min_evaluate_nodes",
} | {
    *("min_available_nodes", "weighted_by_key", "arrayrecord_key", "configrecord_key"),
    *("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "selection_rule", "accountant"),
}
"""Parameters that follow from the rest of the configuration, or whose values are not plain data."""


@dataclass(frozen=True)
class ChosenStrategy:
    """A strategy that is ready to run one training, and how the rounds call it."""

    strategy: Strategy
    folds: bool
    """Whether updates are folded in on arrival; otherwise a round's updates are all kept in
    memory."""
    means: bool
    """Whether the new weights are the mean of the updates: then the strategy is not called for
    them."""
    notes: Sequence[str]
    """Notes for the user, before the run starts."""
    in_place: bool = True
    """Whether a grid may add updates up where they are computed: one message, apart from
    settings, then represents all of a round's."""
    label: str = ""
    """Value of ``federation.strategy``, where it is not the name of the strategy's class."""

    @property
    def own(self) -> AlgorithmStrategy | None:
        """The adapter of a user's algorithm; None where a strategy of Flower's kind runs."""
        return self.strategy if isinstance(self.strategy, AlgorithmStrategy) else None

    @property
    def name(self) -> str:
        """Display name in errors."""
        return self.label or type(self.strategy).__name__


def choose_strategy(
    run: RunConfig,
    given: UserStrategy | type[UserStrategy] | None = None,
    *,
    cohort: int,
    size: int,
    name_of: Callable[[int], str] = str,
    distil: Distil | None = None,
) -> ChosenStrategy:
    """Returns the strategy of a run: one of Flower's, `FedDF`, or the user's own.

    Args:
        run: Configuration of the run.
        given: The user's own, where it was passed in from Python; None where the run names it.
        cohort: Number of clients per round.
        size: Length of an update, to state the memory that buffering takes; 0 for no such note.
        name_of: Maps a node to its client's name.
        distil: What `FedDF` distils with; None where its results do not matter.

    Raises:
        ConfigError: the strategy does not exist or does not fit the run. Nothing was run.
    """
    federation = run.federation
    if given is None and federation.strategy == FEDDF:
        adapted = AlgorithmStrategy(
            CheckedAlgorithm(_fed_df(federation.strategy_options, distil), run),
            FEDDF,
            name_of=name_of,
        )
        notes = [_memory_note(FEDDF, cohort, size)] if size else []
        return ChosenStrategy(adapted, False, False, notes, label=FEDDF)
    if given is None and not names_user_strategy(federation.strategy):
        return make_strategy(
            federation.strategy, federation.strategy_options, cohort=cohort, size=size
        )
    own, label = user_strategy(run, given), federation.strategy
    folds = getattr(own, "folds", False) is True
    if run.client_private and not (isinstance(own, Algorithm) and folds):
        raise ConfigError(
            f"federation.strategy = {label!r} contradicts privacy.unit = {run.privacy.unit!r}: "
            "the privacy accounting covers only a sum of updates, not anything else that a "
            "strategy reads in a round. Nothing was run; make it a fedcore.Algorithm that folds, "
            f"or choose one of {', '.join(SUMMED)}."
        )
    notes = [] if folds or not size else [_memory_note(label, cohort, size)]
    if isinstance(own, Algorithm):
        adapted = AlgorithmStrategy(CheckedAlgorithm(own, run), label, name_of=name_of)
        return ChosenStrategy(adapted, folds, False, notes, label=label)
    if isinstance(own, (*_TREES, *_CLIENT_DP)):
        raise ConfigError(
            f"federation.strategy = {label!r}: it derives from a Flower strategy for trees, or "
            "from one whose clients run their own code, which a file on the server cannot "
            "install on devices. Nothing was run; derive it from another strategy."
        )
    for name, value in _WHOLE_COHORT.items():
        if hasattr(own, name):
            setattr(own, name, value)
    return ChosenStrategy(own, folds, False, notes, in_place=False, label=label)


def _fed_df(options: Mapping[str, Any], distil: Distil | None) -> FedDF:
    known = [each.name for each in fields(Distillation)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"federation.strategy_options.{unknown[0]}: FedDF has no such option. It accepts: "
            f"{', '.join(known)}. Nothing was run."
        )
    return FedDF(**options, distil=distil)


_WHOLE_COHORT: Mapping[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,  # they get only the cohort, and use all of it
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "weighted_by_key": NUM_EXAMPLES,
    "arrayrecord_key": ARRAYS,
    "configrecord_key": CONFIG,
}
"""Parameters that have Flower's strategies use the whole cohort and fedcore's record names."""


def strategy_names() -> list[str]:
    """Returns the names of all of Flower's strategies."""
    return sorted(
        name
        for name in flower.__all__
        if inspect.isclass(cls := getattr(flower, name))
        and issubclass(cls, Strategy)
        and cls is not Strategy
    )


def make_strategy(
    name: str, options: Mapping[str, Any], *, cohort: int, size: int
) -> ChosenStrategy:
    """Returns the strategy of Flower's that the configuration names.

    Args:
        name: A class in ``flwr.serverapp.strategy``.
        options: Its keyword arguments. Flower's DP wrappers also take ``strategy``, the name of the
            strategy that they wrap (``FedAvg`` when unset).
        cohort: Number of clients per round.
        size: Length of an update, to state the memory that buffering takes; 0 for no such note.

    Raises:
        ConfigError: the strategy does not exist, cannot aggregate a neural network, or does not
            take these options. Nothing was run.
    """
    cls = _find(name)
    if issubclass(cls, _TREES):
        raise ConfigError(
            f"federation.strategy = {name!r}: it aggregates XGBoost trees, but a task's model is "
            "a torch module. Nothing was run; choose another strategy."
        )
    arguments, notes = dict(options), []
    if cls in _CLIENT_DP:
        inner = make_strategy(str(arguments.pop("strategy", "FedAvg")), {}, cohort=cohort, size=0)
        arguments |= {"strategy": inner.strategy, "num_sampled_clients": cohort}
        notes.append(
            f"{name} adds its own client-level noise, which the epsilon reported by fedcore does "
            "not include."
        )
    else:
        arguments |= _WHOLE_COHORT
    folds = cls in FOLDING
    if not folds and size:
        notes.append(_memory_note(name, cohort, size))
    return ChosenStrategy(_construct(cls, arguments, options), folds, cls in _MEANS, notes)


def _memory_note(name: str, cohort: int, size: int) -> str:
    return (
        f"{name} needs every update of a round at once: {cohort} x {size:,} parameters take "
        f"{cohort * size * 4 / 1e6:,.1f} MB, and up to three times that while it aggregates."
    )


def _find(name: str) -> type[Strategy]:
    names = strategy_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"federation.strategy = {name!r}: Flower has no such strategy.{hint} Available: "
            f"{', '.join(names)}, and FedDF. Nothing was run; to use your own, give its file and "
            "class, e.g. 'mine.py:MyStrategy'."
        )
    found: type[Strategy] = getattr(flower, name)
    return found


def _construct(
    cls: type[Strategy], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> Strategy:
    known = set(inspect.signature(cls).parameters)
    allowed = sorted(known - _RESERVED_OPTIONS - {"num_sampled_clients"})
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        near = difflib.get_close_matches(unknown[0], allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"federation.strategy_options.{unknown[0]}: {cls.__name__} has no such option.{hint} "
            f"It accepts: {', '.join(allowed) or 'none'}. Nothing was run."
        )
    try:
        return cls(**{key: value for key, value in arguments.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"federation.strategy_options: {cls.__name__} refused {dict(options)}: {error}. "
            "Nothing was run."
        ) from None
