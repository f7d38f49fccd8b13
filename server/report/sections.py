"""The text and table sections of a report."""

from __future__ import annotations

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
from server.records import CandidateRecord, RunRecord, VirtualRecord
from server.report.markup import Markup, details, digest, join, table, tag
from server.report.privacy import privacy_card
from server.report.summary import MODELS

_MICRO = "\N{MICRO SIGN}s"


def header(record: RunRecord) -> Markup:
    """Renders the run's name, task and hardware, and the reason if the release was withheld."""
    return tag(
        "header",
        tag("h1", f"Run {record.name}"),
        tag("p", f"Task {record.task}, {record.kind}, trained on {record.device}.", class_="sub"),
        tag("p", f"Nothing was published. {record.withheld}", class_="alert")
        if record.withheld
        else Markup(),
    )


def headline(record: RunRecord, summary: Mapping[str, Any]) -> Markup:
    """Renders the headline figures as cards."""
    cards = (
        _score_card(record),
        privacy_card(record, summary),
        _size_card(summary["model"]),
        _latency_card(summary["latency"]),
        _rounds_card(record),
        _virtual_card(summary),
        (
            "Traffic",
            bytes_text(summary["bytes"]["up"] + summary["bytes"]["down"]),
            f"{bytes_text(summary['bytes']['up'])} up, {bytes_text(summary['bytes']['down'])} down",
        ),
        ("Time", seconds_text(summary["seconds"]["total"]), "the whole run"),
    )
    return tag("dl", *(_card(*card) for card in cards if card), class_="cards")


def _card(label: str, value: str, detail: str) -> Markup:
    return tag(
        "div",
        tag("dt", label),
        tag("dd", value, class_="value"),
        tag("dd", detail, class_="detail"),
        class_="card",
    )


def _score_card(record: RunRecord) -> tuple[str, str, str] | None:
    scores = record.scores.get(record.primary, {})
    reached = [model for model in MODELS if model in scores]
    if not reached:
        return None
    last = reached[-1]
    others = ", ".join(f"{MODELS[m]} {figure(scores[m])}" for m in reached[:-1])
    return f"{record.primary}, {MODELS[last]} model", figure(scores[last]), others or "final test"


def _size_card(model: Mapping[str, Any]) -> tuple[str, str, str] | None:
    released, fp32 = model["released_bytes"], model["fp32_bytes"]
    if not released:
        return None
    detail = f"fp32 has {bytes_text(fp32)}, {fp32 / released:.2g} times as much" if fp32 else ""
    return "Size", bytes_text(released), detail


def _latency_card(latency: Mapping[str, Any]) -> tuple[str, str, str] | None:
    released = latency["released_p50_us"]
    if not released:
        return None
    others = ", ".join(
        f"{name} {figure(latency[key], 3)} {_MICRO} ({latency[key] / released:.2g} times as long)"
        for name, key in (("torch", "torch_p50_us"), ("fp32", "fp32_p50_us"))
        if latency[key]
    )
    return "Inference, p50", f"{figure(released, 3)} {_MICRO}", others


def _rounds_card(record: RunRecord) -> tuple[str, str, str] | None:
    if not record.rounds:
        return None
    planned = record.rounds[-1].rounds
    value = str(len(record.rounds)) + (f" of {planned}" if planned != len(record.rounds) else "")
    return "Rounds", value, f"round {record.best_round} was the best"


def _virtual_card(summary: Mapping[str, Any]) -> tuple[str, str, str] | None:
    virtual = summary["virtual"]
    if virtual is None:
        return None
    return "Rounds on devices", seconds_text(virtual["simulated_s"]), "on the virtual clock"


def training(record: RunRecord) -> Markup:
    """Renders how virtual clients were trained, and the timing of their devices."""
    used, parts = record.training, []
    if used is not None:
        ways = {"loop": "one after the other", "vectorised": "side by side"}
        by = f" by {counted(used.workers, 'worker')}" if used.workers else ""
        parts.append(tag("p", f"Clients were trained {ways[used.method]}{by}: {used.reason}."))
    virtual = [each.virtual for each in record.rounds if each.virtual]
    if virtual:
        total_s = sum(each.simulated_s for each in virtual)
        lost = [
            f"{sum(each.unavailable for each in virtual)} could not be reached",
            f"{sum(each.dropped for each in virtual)} vanished during a round",
            f"{sum(each.stragglers for each in virtual)} were late",
        ]
        wasted = bytes_text(sum(each.bytes_wasted for each in virtual))
        moved = bytes_text(sum(each.bytes_up + each.bytes_down for each in virtual))
        parts.append(
            tag(
                "p",
                f"On their devices the rounds would have taken {seconds_text(total_s)}. Of the "
                f"clients that were asked, {', '.join(lost[:2])} and {lost[2]}; {wasted} of the "
                f"{moved} that crossed the network were for nothing.",
            )
        )
    return join(parts)


def scores_table(record: RunRecord) -> Markup:
    """Renders each metric of each model on the final test split."""
    models = [m for m in MODELS if any(m in scores for scores in record.scores.values())]
    rows = [
        [MODELS[model], *(figure(scores.get(model)) for scores in record.scores.values())]
        for model in models
    ]
    return table(["model", *record.scores], rows, highlighted=MODELS["released"])


def judged(record: RunRecord) -> str:
    """Describes the data on which the metric by round was measured."""
    places = {
        "cloud": "on cloud data that no round trained on",
        "clients": "on data that clients held back",
    }
    place = places.get(record.rounds[-1].judged_on)
    metric = f"The {record.primary} of the global model {place}" if place else "No metric"
    if any(each.client_epsilon is not None for each in record.rounds):
        return f"{metric}, by round, and the client-level epsilon of all models so far."
    if any(each.epsilon_max is not None for each in record.rounds):
        return f"{metric}, and the most epsilon that any client has spent up to each round."
    return f"{metric}, by round."


def rounds_table(record: RunRecord) -> Markup:
    """Renders a collapsed table of all rounds."""
    metrics = list(dict.fromkeys(name for each in record.rounds for name in each.metrics))
    devices = ["on devices", "away", "dropped", "late", "wasted"]
    on_devices = devices if any(each.virtual for each in record.rounds) else []
    of_clients = any(each.client_epsilon is not None for each in record.rounds)
    rows = [
        [
            str(each.round),
            *(figure(each.metrics.get(name)) for name in metrics),
            figure(each.train_loss),
            epsilon_text(each.epsilon_max),
            *([epsilon_text(each.client_epsilon)] if of_clients else ()),
            f"{each.updates} of {each.cohort}",
            str(each.declined),
            str(each.failed),
            bytes_text(each.bytes_up),
            bytes_text(each.bytes_down),
            seconds_text(each.seconds),
            *(_virtual_cells(each.virtual) if on_devices else ()),
        ]
        for each in record.rounds
    ]
    headings = ["round", *metrics, "loss", "epsilon", *(["client epsilon"] if of_clients else ())]
    headings += ["updates", "declined", "failed", "up", "down", "time", *on_devices]
    drawn = table(headings, rows, highlighted=str(record.best_round))
    return details(f"Every round ({len(rows)})", drawn)


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


def candidates_table(record: RunRecord) -> Markup:
    """Renders a table of all candidates with their verdicts."""
    weighed = any(each.clients_drop is not None for each in record.candidates)
    headings = [
        "candidate",
        "verdict",
        record.primary,
        "drop",
        *(["drop on clients, at most"] if weighed else []),
        "agreement",
        "largest error",
        "bytes",
    ]
    rows = [
        [
            each.name,
            each.reason or ("admitted" if each.admitted else "refused"),
            figure(each.metric),
            figure(each.drop),
            *([_drop_on_clients(each)] if weighed else []),
            figure(each.agreement),
            figure(each.max_abs_error, 2),
            bytes_text(each.bytes),
            figure(each.p50_us, 3),
            f"{figure(each.p50_min_us, 3)} to {figure(each.p50_max_us, 3)}",
            digest(each.sha256),
        ]
        for each in record.candidates
    ]
    return table(
        [*headings, f"p50, {_MICRO}", "of blocks", "digest"],
        rows,
        prose="verdict",
        highlighted=record.chosen,
    )


def _drop_on_clients(candidate: CandidateRecord) -> str:
    return "" if candidate.clients_drop is None else figure(candidate.clients_drop)


def clients_table(record: RunRecord) -> Markup:
    """Renders a collapsed table of all clients."""
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
    return details(f"Every client ({len(rows)})", table(headings, rows))


def lineage(record: RunRecord) -> Markup:
    """Renders the provenance of the released model as a chain, each link with its digest."""
    manifest = record.manifest
    steps = [_data_step(record), _rounds_step(record)]
    if manifest is None:
        steps += [_step("Not released", "nothing was signed", absent=True)]
        return tag("section", tag("h2", "Lineage"), tag("ol", *steps, class_="chain"))
    origin = manifest.lineage
    steps += [
        _step("Fine-tuned", "on the cloud's data")
        if origin.finetuned
        else _step("Not fine-tuned", "the federated model went on as it was", absent=True),
        _step(
            f"Candidate {origin.candidate}",
            bytes_text(manifest.onnx.length),
            f"calibration: {origin.calibration}",
        ),
        _step(
            f"Release v{manifest.version}",
            manifest.model,
            digest(manifest.onnx.sha256),
            manifest.created,
            *([f"the bytes of v{origin.rollback_of} again"] if origin.rollback_of else []),
        ),
    ]
    rows = [
        ["run", origin.run],
        ["seed", str(origin.seed)],
        ["configuration", digest(origin.config_sha256)],
        ["global model", digest(origin.parent_sha256)],
        ["golden outputs", digest(manifest.golden.sha256)],
        ["input", f"{manifest.input_dtype} {list(manifest.input_shape)}"],
        ["largest error against its source", figure(manifest.parity.max_abs_error, 2)],
        ["agreement with fp32", figure(manifest.parity.agreement)],
    ]
    return tag(
        "section",
        tag("h2", "Lineage"),
        tag("ol", *steps, class_="chain"),
        details("What the manifest says", table(["entry", "value"], rows, prose="value")),
    )


def _step(title: str, *lines: str, absent: bool = False) -> Markup:
    spans = (tag("span", line) for line in lines)
    return tag("li", tag("strong", title), *spans, class_="step absent" if absent else "step")


def _data_step(record: RunRecord) -> Markup:
    if not record.clients:
        return _step("Device data", "stays on the devices")
    examples = sum(client.examples for client in record.clients)
    count = f"{counted(examples, 'example')} of {counted(len(record.clients), 'client')}"
    return _step("Device data", count, "stays on the devices")


def _rounds_step(record: RunRecord) -> Markup:
    if not record.rounds:
        return _step("No rounds", "no device trained", absent=True)
    lines: list[str] = [counted(len(record.rounds), "round")]
    if record.manifest:
        lines.append(digest(record.manifest.lineage.parent_sha256))
    return _step(f"Global model of round {record.best_round}", *lines)


def stages(record: RunRecord, summary: Mapping[str, Any]) -> Markup:
    """Renders the duration of each stage."""
    if not record.stages:
        return Markup()
    total = summary["seconds"]["total"]
    longest = max(record.stages.values())
    rows = [
        [stage, seconds_text(seconds), _share(seconds, longest)]
        for stage, seconds in record.stages.items()
    ]
    drawn = table(["stage", "time", ""], [*rows, ["whole run", seconds_text(total), ""]])
    return tag("section", tag("h2", "Time"), drawn)


def _share(seconds: float, longest: float) -> Markup:
    width = 12 * seconds / longest if longest > 0 else 0
    return tag("span", class_="share", style=f"width:{width:.2f}rem")


def notes(record: RunRecord) -> Markup:
    """Renders the run's notes."""
    if not record.notes:
        return Markup()
    listed = join(tag("li", note) for note in record.notes)
    return tag("section", tag("h2", "Notes"), tag("ul", listed))
