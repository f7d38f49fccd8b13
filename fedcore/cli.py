"""The ``fedcore VERB`` command line; verbs are entry points of the group ``fedcore.commands``.

`main` parses the arguments, runs the verb and turns errors into messages and exit codes.
"""

from __future__ import annotations

import os
import sys

_STOPPED = "Interrupted: stopped at once; no partial file was left."
try:
    import argparse
    import json
    import signal
    import threading
    from collections.abc import Callable, Iterable, Sequence
    from dataclasses import dataclass
    from importlib.metadata import EntryPoint, entry_points
    from pathlib import Path
    from typing import Any

    from fedcore import __version__
    from fedcore.errors import INTERRUPTED, ConfigError, FedcoreError, InsufficientMemory
    from fedcore.observability.foreign import bounded_line, foreign, say
except KeyboardInterrupt:  # Ctrl-C during imports, before `main` can report it
    os.write(2, f"{_STOPPED}\n".encode())
    raise SystemExit(130) from None

_EXTRA_OF = {
    "torch": "server",
    "opacus": "server",
    "flwr": "server",
    "onnx": "server",
    "onnxscript": "server",
    "jinja2": "server",
    "matplotlib": "server",
    "rich": "server",
    "tensorboard": "server",
    "torch_pruning": "server",
    "sklearn": "sim",
}


@dataclass(frozen=True)
class Command:
    """A verb of the command line."""

    help: str
    """One line, shown in the list of verbs."""
    arguments: Callable[[argparse.ArgumentParser], None]
    """Adds the verb's arguments; must not import torch."""
    run: Callable[[argparse.Namespace], int]
    """Does the work and returns the exit code."""
    example: str = ""
    """A command line to copy, shown below the options."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{self.prog}: {message}. See `{self.prog} --help`.")


def group(verbs: dict[str, Command], help: str) -> Command:
    """Returns a verb that contains other verbs, such as ``fedcore release init``."""

    def arguments(parser: argparse.ArgumentParser) -> None:
        below = parser.add_subparsers(
            dest="subverb", required=True, metavar="VERB", parser_class=_Parser
        )
        for name, command in verbs.items():
            _add(below, name, command)

    return Command(help, arguments, lambda options: int(options.run_subverb(options)))


def json_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--json``, which `show` obeys."""
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def show(options: argparse.Namespace, text: str, value: Any) -> int:
    """Prints the text, or with ``--json`` the value; returns the exit code 0."""
    say(json.dumps(value, indent=2) if options.json else text)
    return 0


def _add(
    below: argparse._SubParsersAction[_Parser],
    name: str,
    command: Command,
    destination: str = "run_subverb",
) -> None:
    parser = below.add_parser(
        name,
        help=command.help,
        description=command.help,
        epilog=f"example: {command.example}" if command.example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**{destination: command.run})
    command.arguments(parser)


def build_parser(
    first: str | None = None, *, verbs: Iterable[EntryPoint] | None = None
) -> argparse.ArgumentParser:
    """Returns the parser with every installed verb, or only with the verb named ``first``.

    ``verbs`` replaces the installed ones, such as by those that a checkout declares. Loading a verb
    may import slow modules; a restarting server cannot wait for all of them.
    """
    parser = _Parser(prog="fedcore", description="One model over devices' data and the cloud's.")
    parser.add_argument("--version", action="version", version=f"fedcore {__version__}")
    below = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    found = entry_points(group="fedcore.commands") if verbs is None else verbs
    installed = sorted(found, key=lambda entry: entry.name)
    named = [entry for entry in installed if entry.name == first]
    for entry in named or installed:
        _add(below, entry.name, entry.load(), "run_verb")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code (listed in `fedcore.errors`)."""
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
        if sys.stdout is None:  # the parent process closed it
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends
        words = sys.argv[1:] if arguments is None else arguments
        options = build_parser(next(iter(words), None)).parse_args(words)
        return int(options.run_verb(options))
    except FedcoreError as error:
        say(bounded_line(f"{type(error).__name__}: {error}"), to=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        say(
            f"ResourceError: this command needs {error.name}, which is not installed. Nothing "
            f"was run; install it with `pip install 'fedcore[{extra}]'`.",
            to=sys.stderr,
        )
        return 7
    except BrokenPipeError:  # `fedcore ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # no step handled it: a device removed, a path that is a folder
        where = f"{error.filename}: " if error.filename else ""
        say(
            f"ResourceError: {where}{error.strerror or error}. The command was stopped; check "
            "that the path exists and that this user may access it, and run it again.",
            to=sys.stderr,
        )
        return 7
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say(
            f"InsufficientMemory: memory ran out ({foreign(error) or type(error).__name__}). The "
            "command was stopped; provide more memory, or reduce the model, the batches or the "
            "number of processes.",
            to=sys.stderr,
        )
        return InsufficientMemory.exit_code
    except KeyboardInterrupt:
        say(_STOPPED, to=sys.stderr)
        return INTERRUPTED


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error of Python, NumPy, torch or the system means that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return any(part in text for part in ("allocate memory", "out of memory", "start new thread"))


if __name__ == "__main__":
    sys.exit(main())
