"""The figures, sentences and tables of a report, as data for its template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedcore.observability.words import (
    NOTHING,
    bytes_text,
    counted,
    epsilon_text,
    figure,
    seconds_text,
)
from server.records import CandidateRecord, ClientTestRecord, RunRecord, VirtualRecord
from server.report.parts import Bar, Card, Cell, Digest, LineageStep, Table
from server.report.privacy import privacy_card
from server.report.summary import MODELS

LAST_KEPT = "last round kept, nothing judged them"
"""Said in place of the best round where no data judged the rounds."""
_MICRO = "\N{MICRO SIGN}s"


def headline(record: RunRecord, summary: Mapping[str, Any]) -> list[Card]:
    """Returns the headline figures."""
    cards = (
        _score_card(record),
        privacy_card(record, summary),
        _size_card(summary["model"]),
        _latency_card(summary["latency"]),
        _rounds_card(record),
        _virtual_card(summary),
        Card(
            "Traffic",
            bytes_text(summary["bytes"]["up"] + summary["bytes"]["down"]),
            f"{bytes_text(summary['bytes']['up'])} up, {bytes_text(summary['bytes']['down'])} down",
        ),
        Card("Time", seconds_text(summary["seconds"]["total"]), "the whole run"),
    )
    return [card for card in cards if card]


def _score_card(record: RunRecord) -> Card | None:
    scores = record.scores.get(record.primary, {})
    reached = [model for model in MODELS if model in scores]
    if not reached:
        return None
    last = reached[-1]
    others = ", ".join(f"{MODELS[m]} {figure(scores[m])}" for m in reached[:-1])
    label = f"{record.primary}, {MODELS[last]} model"
    return Card(label, figure(scores[last]), others or "final test")


def _size_card(model: Mapping[str, Any]) -> Card | None:
    released, fp32 = model["released_bytes"], model["fp32_bytes"]
    if not released:
        return None
    detail = f"fp32 has {bytes_text(fp32)}, {fp32 / released:.2g} times as much" if fp32 else ""
    return Card("Size", bytes_text(released), detail)


def _latency_card(latency: Mapping[str, Any]) -> Card | None:
    released = latency["released_p50_us"]
    if not released:
        return None
    others = ", ".join(
        f"{name} {figure(latency[key], 3)} {_MICRO} ({latency[key] / released:.2g} times as long)"
        for name, key in (("torch", "torch_p50_us"), ("fp32", "fp32_p50_us"))
        if latency[key]
    )
    return Card("Inference, p50", f"{figure(released, 3)} {_MICRO}", others)


def _rounds_card(record: RunRecord) -> Card | None:
    if not record.rounds:
        return None
    planned = record.rounds[-1].rounds
    value = str(len(record.rounds)) + (f" of {planned}" if planned != len(record.rounds) else "")
    kept = f"round {record.best_round} was the best" if record.judged else LAST_KEPT
    return Card("Rounds", value, kept)


def _virtual_card(summary: Mapping[str, Any]) -> Card | None:
    virtual = summary["virtual"]
    if virtual is None:
        return None
    return Card("Rounds on devices", seconds_text(virtual["simulated_s"]), "on the virtual clock")


def training(record: RunRecord) -> list[str]:
    """Describes how virtual clients were trained, and the timing of their devices."""
    used, paragraphs = record.training, []
    if used is not None:
        ways = {"loop": "one at a time", "vectorised": "in vectorised batches"}
        by = f" by {counted(used.workers, 'worker')}" if used.workers else ""
        paragraphs.append(f"Clients were trained {ways[used.method]}{by}: {used.reason}.")
    virtual = [each.virtual for each in record.rounds if each.virtual]
    if virtual:
        total_s = sum(each.simulated_s for each in virtual)
        lost = [
            f"{sum(each.unavailable for each in virtual)} were unreachable",
            f"{sum(each.dropped for each in virtual)} dropped out during a round",
            f"{sum(each.stragglers for each in virtual)} were late",
        ]
        wasted = bytes_text(sum(each.bytes_wasted for each in virtual))
        moved = bytes_text(sum(each.bytes_up + each.bytes_down for each in virtual))
        paragraphs.append(
            f"On their devices the rounds would have taken {seconds_text(total_s)}. Of the "
            f"clients that were asked, {', '.join(lost[:2])} and {lost[2]}; {wasted} of the "
            f"{moved} transferred were wasted."
        )
    return paragraphs


def scores_table(record: RunRecord) -> Table:
    """Returns each metric of each model on the final test split."""
    models = [m for m in MODELS if any(m in scores for scores in record.scores.values())]
    rows = [
        [MODELS[model], *(figure(scores.get(model)) for scores in record.scores.values())]
        for model in models
    ]
    return Table(["model", *record.scores], rows, highlighted=MODELS["released"])


_UNJUDGED = "No data judged the rounds, so the model of the last one was kept"


def judged(record: RunRecord) -> str:
    """Describes the data on which the metric by round was measured; empty without rounds."""
    if not record.rounds:
        return ""
    places = {
        "cloud": "on cloud data that no round trained on",
        "clients": "on data that clients held back",
    }
    if record.settings.get("federation.holdout_by") == "clients":
        places["clients"] = "on clients that never trained"
    place = places.get(record.rounds[-1].judged_on)
    metric = f"The {record.primary} of the global model {place}" if place else _UNJUDGED
    if any(each.client_epsilon is not None for each in record.rounds):
        return f"{metric}, by round, and the client-level epsilon of all models so far."
    if any(each.epsilon_max is not None for each in record.rounds):
        return f"{metric}, and the most epsilon that any client has spent up to each round."
    return f"{metric}, by round." if place else f"{metric}."


def client_tests_table(record: RunRecord) -> Table | None:
    """Returns clients' results on their own test data, the worst first; None without any.

    Clients on whose data the metric is undefined come last.
    """
    if not record.client_tests:
        return None
    sign = 1.0 if record.higher_is_better else -1.0

    def place(each: ClientTestRecord) -> tuple[bool, float, str]:
        undefined = math.isnan(each.released)  # compares with nothing
        return undefined, 0.0 if undefined else sign * each.released, each.client

    ordered = sorted(record.client_tests, key=place)
    rows = [
        [each.client, str(each.examples), figure(each.federated), figure(each.released)]
        for each in ordered
    ]
    tested = (f"{record.primary}, {name}" for name in ("federated", "released"))
    return Table(["client", "examples", *tested], rows)


_MEAN = ", mean of clients"


def mean_of_clients(record: RunRecord) -> set[str]:
    """Returns the metrics that are means of the clients' values in some round."""
    return {
        name for each in record.rounds for name, source in each.sources.items() if source.averaged
    }


def metric_notes(record: RunRecord) -> list[str]:
    """Describes which metrics are means of clients, and which some clients could not measure."""
    kept = next((each for each in record.rounds if each.round == record.best_round), None)
    notes = []
    means = [name for name in (kept.sources if kept else ()) if name in mean_of_clients(record)]
    if means:
        notes.append(
            f"Mean of the clients' values, weighted by their examples: {', '.join(means)}. Other "
            "metrics are values over all examples of the clients together."
        )
    for name, source in (kept.sources if kept else {}).items():
        if source.undefined:
            notes.append(
                f"{name}: {source.clients} of {counted(source.asked, 'client')} "
                f"({source.undefined} undefined: {source.reason})."
            )
    return notes


def settings_table(record: RunRecord) -> Table | None:
    """Returns the run's settings; None if they are not known."""
    if not record.settings:
        return None
    rows = [
        [name, NOTHING if value is None else str(value)] for name, value in record.settings.items()
    ]
    return Table(["setting", "value"], rows, prose="value")


def rounds_table(record: RunRecord) -> Table:
    """Returns the table of all rounds."""
    metrics = list(dict.fromkeys(name for each in record.rounds for name in each.metrics))
    means = mean_of_clients(record)
    devices = ["on devices", "away", "dropped", "late", "wasted"]
    on_devices = devices if any(each.virtual for each in record.rounds) else []
    of_clients = any(each.client_epsilon is not None for each in record.rounds)
    changing = list(dict.fromkeys(name for each in record.rounds for name in each.client))
    rows = [
        [
            str(each.round),
            *(
                figure(each.client.get(name, record.settings.get(f"client.{name}")))
                for name in changing
            ),
            *(figure(each.metrics.get(name)) for name in metrics),
            figure(each.train_loss),
            epsilon_text(each.epsilon_max),
            *([epsilon_text(each.client_epsilon)] if of_clients else ()),
            f"{each.updates} of {each.cohort}",
            str(each.declined),
            str(each.failed),
            str(max(0, each.cohort - each.updates - each.declined - each.failed)),
            bytes_text(each.bytes_up),
            bytes_text(each.bytes_down),
            seconds_text(each.seconds),
            *(_virtual_cells(each.virtual) if on_devices else ()),
        ]
        for each in record.rounds
    ]
    shown = [f"{name}{_MEAN if name in means else ''}" for name in metrics]
    headings = [
        "round",
        *(name.replace("_", " ") for name in changing),
        *shown,
        "training loss",
        "epsilon",
        *(["client epsilon"] if of_clients else ()),
    ]
    headings += ["updates", "declined", "failed", "no reply", "up", "down", "time", *on_devices]
    return Table(headings, rows, highlighted=str(record.best_round) if record.judged else None)


def _virtual_cells(virtual: VirtualRecord | None) -> tuple[str, ...]:
    if virtual is None:
        return (NOTHING,) * 5
    return (
        seconds_text(virtual.simulated_s),
        str(virtual.unavailable),
        str(virtual.dropped),
        str(virtual.stragglers),
        bytes_text(virtual.bytes_wasted),
    )


def candidates_table(record: RunRecord) -> Table:
    """Returns the table of all candidates with their verdicts."""
    measured = any(each.clients_drop is not None for each in record.candidates)
    headings = [
        "candidate",
        "verdict",
        record.primary,
        "drop",
        *(["drop on clients, at most"] if measured else []),
        "agreement",
        "largest error",
        "bytes",
    ]
    rows: list[list[Cell]] = [
        [
            each.name,
            each.reason or ("admitted" if each.admitted else "refused"),
            figure(each.metric),
            figure(each.drop),
            *([_drop_on_clients(each)] if measured else []),
            figure(each.agreement),
            figure(each.max_abs_error, 2),
            bytes_text(each.bytes) if each.bytes else NOTHING,  # it could not be built
            figure(each.p50_us, 3),
            f"{figure(each.p50_min_us, 3)} to {figure(each.p50_max_us, 3)}",
            Digest(each.sha256),
        ]
        for each in record.candidates
    ]
    return Table(
        [*headings, f"p50, {_MICRO}", "of blocks", "digest"],
        rows,
        prose="verdict",
        highlighted=record.chosen,
    )


def _drop_on_clients(candidate: CandidateRecord) -> str:
    return "" if candidate.clients_drop is None else figure(candidate.clients_drop)


def clients_table(record: RunRecord) -> Table:
    """Returns the table of all clients."""
    headings = ["client", "examples", record.primary, "epsilon", "rounds"]
    rows = [
        [
            each.client,
            str(each.examples),
            figure(each.metric),
            epsilon_text(each.epsilon),
            str(each.rounds),
        ]
        for each in record.clients
    ]
    return Table(headings, rows)


def lineage(record: RunRecord) -> list[LineageStep]:
    """Returns the provenance of the released model as a chain, each link with its digest."""
    manifest = record.manifest
    steps = [_data_step(record), _rounds_step(record)]
    if manifest is None:
        return [*steps, LineageStep("Not released", ("nothing was signed",), absent=True)]
    origin = manifest.lineage
    return [
        *steps,
        LineageStep("Fine-tuned", ("on the cloud's data",))
        if origin.finetuned
        else LineageStep("Not fine-tuned", ("the federated model went on as it was",), absent=True),
        LineageStep(
            f"Candidate {origin.candidate}",
            (bytes_text(manifest.onnx.length), f"calibration: {origin.calibration}"),
        ),
        LineageStep(
            f"Release v{manifest.version}",
            (
                manifest.model,
                Digest(manifest.onnx.sha256),
                manifest.created,
                *([f"the bytes of v{origin.rollback_of} again"] if origin.rollback_of else []),
            ),
        ),
    ]


def manifest_table(record: RunRecord) -> Table | None:
    """Returns the manifest's entries; None if nothing was released."""
    manifest = record.manifest
    if manifest is None:
        return None
    origin = manifest.lineage
    rows: list[list[Cell]] = [
        ["run", origin.run],
        ["seed", str(origin.seed)],
        ["configuration", Digest(origin.config_sha256)],
        ["global model", Digest(origin.parent_sha256)],
        ["golden outputs", Digest(manifest.golden.sha256)],
        ["input", f"{manifest.input_dtype} {list(manifest.input_shape)}"],
        ["largest error against its source", figure(manifest.parity.max_abs_error, 2)],
        ["agreement with fp32", figure(manifest.parity.agreement)],
    ]
    return Table(["entry", "value"], rows, prose="value")


def _data_step(record: RunRecord) -> LineageStep:
    if not record.clients:
        return LineageStep("Device data", ("stays on the devices",))
    examples = sum(client.examples for client in record.clients)
    count = f"{counted(examples, 'example')} of {counted(len(record.clients), 'client')}"
    return LineageStep("Device data", (count, "stays on the devices"))


def _rounds_step(record: RunRecord) -> LineageStep:
    if not record.rounds:
        return LineageStep("No rounds", ("no device trained",), absent=True)
    lines: list[Cell] = [counted(len(record.rounds), "round")]
    if record.manifest:
        lines.append(Digest(record.manifest.lineage.parent_sha256))
    return LineageStep(f"Global model of round {record.best_round}", tuple(lines))


def stages(record: RunRecord, summary: Mapping[str, Any]) -> Table:
    """Returns the duration of each stage."""
    longest = max(record.stages.values(), default=0)
    rows: list[list[Cell]] = [
        [stage, seconds_text(seconds), _share(seconds, longest)]
        for stage, seconds in record.stages.items()
    ]
    whole = ["whole run", seconds_text(summary["seconds"]["total"]), ""]
    return Table(["stage", "time", ""], [*rows, whole])


def _share(seconds: float, longest: float) -> Bar:
    return Bar(12 * seconds / longest if longest > 0 else 0)
