"""Commands ``fedcore privacy show | verify | export``: read-only access to a device's ledger."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.cli import Command, json_option
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import Privacy
from fedcore.errors import PrivacyError
from fedcore.observability.foreign import foreign, say
from fedcore.observability.words import counted, epsilon_floor_text, epsilon_text

if TYPE_CHECKING:
    from edge_client.ledger.view import LedgerFiles, LedgerView, RunView, Total

_MAX_TEXT = 2000  # characters of one problem with a ledger
_SHOWN_ROUNDS = 12
"""Charges per run in a table, the first and last ones: composing each takes time."""


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="folder of the device's ledger, e.g. --state /var/lib/fedcore/device (default: "
        "`device` in the folder of the kit)",
    )
    parser.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help=(
            "folder of the device's kit, whose mark and count are compared with the ledger, e.g. "
            "--kit kit"
        ),
    )
    json_option(parser)


def _counting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--owner",
        type=Path,
        metavar="FILE",
        help="file with the limits set by the owner of this device, e.g. --owner owner.toml; "
        "without it budgets are unknown",
    )
    parser.add_argument(
        "--accountant",
        choices=["rdp", "prv"],
        default=Privacy().accountant,
        help="how charges are composed; a run's own is in its settings (default: %(default)s)",
    )


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _where(parser)
    _counting(parser)
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot epsilon by round, e.g. --plot ledger.png (.pdf, .svg)",
    )


def _show(options: argparse.Namespace) -> int:
    if options.plot is not None:
        from edge_client.ledger.plot import check_plot

        check_plot(options.plot)
    from edge_client.ledger.reading import read_ledger

    view = read_ledger(
        options.kit,
        state=options.state,
        owner=options.owner or OPEN_POLICY,
        accountant=options.accountant,
        max_lines=None if options.json or options.plot else _SHOWN_ROUNDS,
    )
    if options.json:
        say(json.dumps(view.to_dict(), indent=2, allow_nan=False))
    else:
        say("\n".join(_table(view, owned=options.owner is not None)))
    if options.plot is not None:
        view.plot(options.plot)
    return _ended(options, view.problems)


def _ended(options: argparse.Namespace, problems: Sequence[str]) -> int:
    """Returns the exit code; if the ledger is damaged, reports so on standard error as well."""
    if not problems:
        return 0
    say(
        f"{PrivacyError.__name__}: {options.state or options.kit / 'device'}: this ledger is "
        "damaged, so the figures are a lower bound of what was spent: "
        f"{counted(len(problems), 'problem')}, listed on standard output with what to do. Nothing "
        "was changed, and this device will not train with privacy.",
        to=sys.stderr,
    )
    return PrivacyError.exit_code


def _table(view: LedgerView, *, owned: bool) -> Iterator[str]:
    yield from (f"damaged: {foreign(problem, _MAX_TEXT)}" for problem in view.problems)
    if view.problems and view.runs:
        yield "Charges may be missing: the following figures are lower bounds."
    elif view.problems:
        yield "No charge can be read, so the epsilon spent is unknown."
    elif not view.runs:
        yield "Nothing was charged: this device has not trained with privacy."
    least = "at least " if view.problems else ""
    for run in view.runs:
        spent = epsilon_text(run.epsilon)
        yield f"run {foreign(run.name)}: epsilon {least}{spent} at delta {run.target_delta:g}"
        yield "  round   steps   sample rate   noise     epsilon so far"
        yield from _lines(run)
        if run.room is not None:
            yield f"  the owner's budget allows {run.room} like the latest"
    yield from (_total_line(total, owned=owned) for total in view.totals)
    if not owned and view.totals:
        yield "No owner's file was given, so budgets are unknown: pass it with --owner owner.toml."


def _lines(run: RunView) -> Iterator[str]:
    before = 0
    for line in run.lines:
        if line.place > before + 1:
            yield f"  ... {line.place - before - 1} more; --json has them all"
        before, one = line.place, line.spent
        yield (
            f"  {one.round:>5}   {one.steps:>5}   {one.sample_rate:>11.4g}   "
            f"{one.noise_multiplier:<7.4g}   {epsilon_text(line.epsilon)}"
            f"{'   evaluation on held-out data' if one.charge.evaluates else ''}"
        )


def _total_line(total: Total, *, owned: bool) -> str:
    who = f"data set {total.name}" if total.name else "device, all runs"
    least = "" if total.whole else "at least "
    spent = f"{who}: epsilon {least}{epsilon_text(total.epsilon)} at delta {total.target_delta:g}"
    if total.max_epsilon is None:
        return f"{spent}; the owner sets no budget" if owned else spent
    if total.left is None:
        return f"{spent}; how much is left of {total.max_epsilon:g} is unknown"
    return f"{spent}; {epsilon_floor_text(total.left)} of {total.max_epsilon:g} is left"


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _where(parser)
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="verify a file written by `fedcore privacy export` instead of a device's own files; "
        "with --kit, also that this device signed it",
    )


def _verify(options: argparse.Namespace) -> int:
    if options.export is not None:
        return _verify_export(options)
    from edge_client.ledger.reading import verify_ledger

    found = verify_ledger(options.kit, state=options.state)
    if options.json:
        told = {
            "charges": found.charges,
            "problems": found.problems,
            "notes": found.notes,
            "behind": found.behind,
        }
        say(json.dumps(told, indent=2))
    else:
        for note in found.notes:
            say(f"note: {foreign(note, _MAX_TEXT)}")
        for problem in found.problems:
            say(f"damaged: {foreign(problem, _MAX_TEXT)}")
        held = f"{counted(found.charges, 'charge')} of {counted(len(found.runs), 'run')}"
        for lacks in found.behind:
            say(f"behind: {foreign(lacks, _MAX_TEXT)}")
        say(f"{found.folder}: {held}, {_agreed(found)}")
    return _ended(options, found.problems)


def _agreed(found: LedgerFiles) -> str:
    """Describes whether the files that record charges agree."""
    if found.problems:
        return "can be read, others may be missing"
    if found.behind:
        return (
            "and none is missing. A file that is behind was removed or replaced by an earlier "
            "copy, or the device was interrupted: its next start corrects that; nothing was "
            "changed here"
        )
    return "and all agrees"


def _verify_export(options: argparse.Namespace) -> int:
    from edge_client.ledger.reading import verify_ledger_export

    checked = verify_ledger_export(options.export, kit=options.kit)
    ledger = checked.ledger
    told = {
        "made_at": ledger.made_at,
        "signer": checked.signer or None,
        "charges": checked.charges,
        "epsilon": ledger.device.epsilon,
        "target_delta": ledger.device.target_delta,
        "problems": ledger.problems,
    }
    if options.json:
        say(json.dumps(told, indent=2))
    else:
        signed = f"signed by the key {checked.signer}" if checked.signer else "not signed"
        say(
            f"{options.export}: exported {foreign(ledger.made_at)}, {signed}. "
            f"{counted(checked.charges, 'charge')} come to epsilon "
            f"{epsilon_text(ledger.device.epsilon)} at delta {ledger.device.target_delta:g}, as "
            "it says."
        )
        for problem in ledger.problems:
            say(f"damaged when it was exported: {foreign(problem, _MAX_TEXT)}")
    if not ledger.problems:
        return 0
    say(
        f"{PrivacyError.__name__}: {options.export}: the device's ledger was damaged when it was "
        "exported, so epsilon is a lower bound; standard output lists the damage. Repair the "
        "ledger on the device, and export it again.",
        to=sys.stderr,
    )
    return PrivacyError.exit_code


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _where(parser)
    _counting(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write, e.g. --out ledger-export.json"
    )


def _export(options: argparse.Namespace) -> int:
    from edge_client.ledger.reading import export_ledger

    exported = export_ledger(
        options.kit,
        state=options.state,
        owner=options.owner or OPEN_POLICY,
        accountant=options.accountant,
        out=options.out,
    )
    if options.out is None:
        say(exported.raw.decode().removesuffix("\n"))
    else:
        for problem in exported.ledger.problems:
            say(f"damaged: {foreign(problem, _MAX_TEXT)}")
        say(f"{options.out}: {counted(exported.charges, 'charge')}")
    return _ended(options, exported.ledger.problems)


show = Command(
    help="show what this device has spent, by run and round, and how much is left",
    arguments=_show_arguments,
    run=_show,
    example="fedcore privacy show --kit kit --owner owner.toml",
)
verify = Command(
    help="cross-check this device's records of what it has spent, or verify an export",
    arguments=_verify_arguments,
    run=_verify,
    example="fedcore privacy verify --kit kit",
)
export = Command(
    help="write all charges and their totals, signed by this device, for an auditor",
    arguments=_export_arguments,
    run=_export,
    example="fedcore privacy export --kit kit --out ledger-export.json",
)
