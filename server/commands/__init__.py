"""Subcommands ``simulate``, ``finetune``, ``check``, ``release``, ``runs``, over `server.api`.

Start with `simulate_command`. torch is imported only when a command that needs it runs.
"""

from server.commands.check_command import check
from server.commands.finetune_command import finetune
from server.commands.release_commands import release
from server.commands.runs_command import runs
from server.commands.simulate_command import simulate

__all__ = ["check", "finetune", "release", "runs", "simulate"]
