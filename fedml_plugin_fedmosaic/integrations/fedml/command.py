"""Extends the ``fedml run`` command: ``fedml run --algo NAME [--cf FILE] ...``.

FedML's group object is changed in place, because ``fedml.cli.cli`` holds the object itself. Without
``--algo`` the group behaves as before.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.core import ParameterSource

from fedml_plugin_fedmosaic.core.errors import IntegrationError
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.integrations.fedml.compat import require

# The command line is the other door, on the same floor as this one: neither imports the other, so
# the function is found by its name when the command runs, like a member of a shelf.
_RUN_COMMAND = ("fedml_plugin_fedmosaic.cli.run", "run_command")


def _known_algo(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    if value.lower() not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise click.BadParameter(f"unknown algorithm {value!r}; known: {known}", ctx, param)
    return value.lower()


def our_options() -> list[click.Option]:
    """The options that ``fedml run`` gains; their Python names start with ``fm_``."""
    return [
        click.Option(
            ["--algo", "fm_algo"],
            metavar="NAME",
            callback=_known_algo,
            help="Run this algorithm on this machine, e.g. fedmosaic.",
        ),
        click.Option(
            ["--cf", "--yaml_config_file", "fm_cf"],
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="With --algo: configuration; the bundled quickstart when omitted.",
        ),
        click.Option(
            ["--backend", "fm_backend"],
            type=click.Choice(["sp", "MPI"], case_sensitive=False),
            help="With --algo: one process (sp) or MPI ranks.",
        ),
        click.Option(
            ["-np", "--ranks", "fm_ranks"],
            type=click.IntRange(min=1),
            metavar="N",
            help="With --algo: start N MPI ranks on this machine.",
        ),
        click.Option(
            ["--set", "fm_overrides"],
            metavar="SECTION.KEY=VALUE",
            multiple=True,
            help="With --algo: change one key of the configuration; may be repeated.",
        ),
        click.Option(
            ["--run-dir", "fm_run_dir"],
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="With --algo: folder for the results; a new one under runs/ when omitted.",
        ),
        click.Option(
            ["--resume", "fm_resume"],
            metavar="RUN_DIR",
            type=click.Path(path_type=Path),
            help="With --algo: go on with an interrupted run, on any number of ranks.",
        ),
        click.Option(
            ["--from-round", "fm_from_round"],
            type=click.IntRange(min=0),
            metavar="N",
            help="With --resume: go on after round N and forget what came later.",
        ),
        click.Option(
            ["--dry-run", "fm_dry_run"],
            is_flag=True,
            help="With --algo: check everything and say what would run.",
        ),
        click.Option(
            ["--debug", "fm_debug"], is_flag=True, help="With --algo: tracebacks and more log."
        ),
    ]


def extend(module: ModuleType) -> None:
    """Adds our options to ``fedml run``.

    Raises:
        IntegrationError: the module has no click group, or an option name is taken; nothing is
            changed then.
    """
    require(module, "fedml_run")
    group = module.fedml_run
    if not isinstance(group, click.Group):
        raise IntegrationError(f"{module.__name__}.fedml_run is not a click group")
    options = our_options()
    taken = {text for param in group.params for text in (*param.opts, *param.secondary_opts)}
    clash = taken & {text for option in options for text in option.opts}
    if clash:
        raise IntegrationError(f"fedml run has {', '.join(sorted(clash))} already")
    group.callback = _callback(group.callback, options)
    group.params.extend(options)
    # FedML's group keeps no_args_is_help, so a bare "fedml run" still shows the help.
    group.invoke_without_command = True


def _callback(stock: Callable[..., Any] | None, options: list[click.Option]) -> Callable[..., Any]:
    names = [str(option.name) for option in options]
    spelling = {str(option.name): option.opts[0] for option in options}

    def run(**values: Any) -> Any:
        ours = {name: values.pop(name) for name in names}
        ctx = click.get_current_context()
        given = [name for name in names if _given(ctx, name)]
        if ours["fm_algo"] is None:
            if given:
                raise click.UsageError(f"{spelling[given[0]]} needs --algo NAME", ctx)
            if ctx.invoked_subcommand is None:
                raise click.UsageError("Missing command.", ctx)
            return stock(**values) if stock is not None else None
        if ctx.invoked_subcommand is not None:
            text = f"--algo cannot be combined with sub-command {ctx.invoked_subcommand!r}"
            raise click.UsageError(text, ctx)
        foreign = [
            param.opts[0]
            for param in ctx.command.params
            if param.name in values and _given(ctx, str(param.name))
        ]
        if foreign:
            text = f"{foreign[0]} is for FedML's platform and has no meaning with --algo"
            raise click.UsageError(text, ctx)
        ctx.exit(_run(ours))

    return run


def _given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _run(ours: dict[str, Any]) -> int:
    if ours["fm_ranks"] is not None and ours["fm_backend"] == "sp":
        raise click.UsageError("-np needs --backend MPI")
    module, function = _RUN_COMMAND
    run_command = getattr(import_module(module), function)
    return int(
        run_command(
            algo=ours["fm_algo"],
            cf=ours["fm_cf"],
            backend=ours["fm_backend"],
            overrides=tuple(ours["fm_overrides"]),
            run_dir=ours["fm_run_dir"],
            resume=ours["fm_resume"],
            from_round=ours["fm_from_round"],
            ranks=ours["fm_ranks"],
            dry_run=ours["fm_dry_run"],
            debug=ours["fm_debug"],
        )
    )
