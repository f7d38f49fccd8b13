"""Subcommand ``fedcore privacy audit``: attacks the training function and reports its leakage."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.cli import Command
from fedcore.errors import ConfigError, FedcoreError
from fedcore.files import check_file, check_folder
from fedcore.observability.foreign import say
from fedcore.observability.patience import LOADING, note_if_slow

if TYPE_CHECKING:
    from server.privacy.audit import Statement
    from server.privacy.inversion import Picture

_MAX_SEEDS = 10_000
_MAX_EXAMPLES = 10**9
_SHOWN = 40  # characters shown of an invalid value


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        help="a run's TOML file, whose noise, clip norm, sample rate and steps are audited "
        "(default: one step with noise multiplier 1)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a value of the file, e.g. --set privacy.max_epsilon=4; may be repeated",
    )
    parser.add_argument(
        "--examples",
        type=_examples,
        metavar="N",
        help="number of examples of the planned client, e.g. --examples 600 (default: that of "
        "the task's first client)",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        default=5,
        help=f"independent audits, at most {_MAX_SEEDS:,}, each with canaries from its own "
        "seed; the noise comes from the operating system, as on devices (default: 5)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write report.html and inversion.png into this folder, which is created if missing, "
        "e.g. --report runs/audit",
    )
    parser.add_argument(
        "--json", action="store_true", help="print progress and the findings as JSON"
    )


def _seeds(text: str) -> int:
    return _number(text, _MAX_SEEDS)


def _examples(text: str) -> int:
    return _number(text, _MAX_EXAMPLES)


def _number(text: str, maximum: int) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= len(str(maximum)):
        number = int(text)
        if 1 <= number <= maximum:
            return number
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    raise argparse.ArgumentTypeError(
        f"expected a whole number from 1 to {maximum:,}, got {shown!r}. Nothing was audited"
    )


def _audit(options: argparse.Namespace) -> int:
    if options.config is None and (options.overrides or options.examples):
        raise ConfigError(
            "audit: --set and --examples apply to a run, but no run's file was given. Nothing "
            "was audited; add the file's path."
        )
    if options.report is not None:
        check_folder(options.report, option="--report")
        for name in ("report.html", "inversion.png"):
            check_file(options.report / name, option="--report")
    with note_if_slow(LOADING):
        statements = _statements(options)
        from fedcore.observability.console import choose
        from fedcore.observability.events import Noted
        from server.privacy.audit import Audited
        from server.privacy.auditing import PrivacyAudit, findings

    audited: list[Audited] = []
    pictures: list[Picture] = []
    try:
        with choose(sys.stdout, json=options.json) as emit:
            for one in findings(statements, options.seeds, emit):
                audited.append(one) if isinstance(one, Audited) else pictures.append(one)
            if options.report is not None:
                PrivacyAudit(tuple(audited), tuple(pictures)).write_report(options.report)
                emit(Noted(f"report: {options.report / 'report.html'}"))
    except FedcoreError as error:
        if not any(one.refuted for one in audited):
            raise
        say(f"{type(error).__name__}: {error}", to=sys.stderr)  # a refutation is the graver error
    finally:  # findings so far survive any error
        found = PrivacyAudit(tuple(audited), tuple(pictures))
        if audited and options.json:
            say(json.dumps({"event": "summary", **found.to_dict()}))
        elif audited:
            say(str(found))
    found.require_sound()
    return 0


def _statements(options: argparse.Namespace) -> list[Statement]:
    """Returns the statements to audit."""
    from server.privacy.auditing import statements_of, usual_statements

    if options.config is None:
        return usual_statements()
    from fedcore.config.settings import load_run

    run = load_run(options.config, options.overrides)
    with redirect_stdout(sys.stderr):  # keeps output of the task out of machine-readable output
        return statements_of(run, options.examples)


audit = Command(
    help="attack the training that devices run, and compare what leaks with the stated epsilon",
    arguments=_arguments,
    run=_audit,
    example="fedcore privacy audit run.toml --seeds 5 --report runs/audit",
)
