"""The command group; each command lives in its own file and is imported when it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from fedml_plugin_fedmosaic import __version__
from fedml_plugin_fedmosaic.cli.errors import Settings, exit_code_of

_ROOT = "fedml_plugin_fedmosaic.cli"
_EXIT_BROKEN_PIPE = 141  # as if SIGPIPE had ended it
_COMMANDS = {
    # name: (module:attribute, one line of help)
    "run": (f"{_ROOT}.run:command", "Train a federation and print its table."),
    "compare": (f"{_ROOT}.compare:command", "Run strategies with several seeds and compare."),
    "bench": (f"{_ROOT}.bench:command", "Run a benchmark and make its leaderboard."),
    "sweep": (f"{_ROOT}.sweep:command", "Run many settings as one job array."),
    "collect": (f"{_ROOT}.collect:command", "Show a sweep as one table, with plots and CSV."),
    "submit": (f"{_ROOT}.submit:command", "Start a run as a job of a cluster."),
    "jobs": (f"{_ROOT}.jobs:command", "List jobs and what became of them."),
    "logs": (f"{_ROOT}.logs:command", "Show what a job writes."),
    "cancel": (f"{_ROOT}.cancel:command", "End a job."),
    "align": (f"{_ROOT}.align:command", "Give different models common coordinates."),
    "adapt": (f"{_ROOT}.adapt:command", "Try a run's adapters on tasks that no client had."),
    "exam": (f"{_ROOT}.exam:command", "Put GSM8K or MMLU to a run's clients."),
    "export": (f"{_ROOT}.export:command", "Write a client's model as a plain LoRA adapter."),
    "config": (f"{_ROOT}.config:command", "Check, show and explain configurations."),
    "data": (f"{_ROOT}.data:command", "Look at, or fetch, the data of an experiment."),
    "models": (f"{_ROOT}.models:command", "Fetch base models, or build the bundled ones."),
    "doctor": (f"{_ROOT}.doctor:command", "Check the installation and name its parts."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called, and reports errors without traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The names in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Imports the command."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Lists the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command; our own errors end the process with their exit code."""
        settings = ctx.ensure_object(Settings)
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except BrokenPipeError:
            # Whoever reads (head, less) has seen enough; Python must not complain at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(_EXIT_BROKEN_PIPE)
        except (Exception, KeyboardInterrupt) as error:
            ctx.exit(exit_code_of(error, debug=settings.debug))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with 'fedmosaic run': bundled data and models, under 5 minutes on 2 CPU cores.",
)
@click.version_option(__version__, prog_name="fedmosaic")
def cli() -> None:
    """Personalised federated fine-tuning of heterogeneous models with FedMosaic.

    \b
    Examples:
      fedmosaic run                                   the bundled quickstart
      fedmosaic run --cf mine.yaml --set comm_round=2
      fedmosaic compare --strategies local,fedavg,fedmosaic --seeds 3
      fedmosaic config show > mine.yaml               a complete file to start from
    """


def main(args: Sequence[str] | None = None, prog_name: str = "fedmosaic") -> NoReturn:
    """The console script."""
    cli.main(args=None if args is None else list(args), prog_name=prog_name)
    sys.exit(0)
