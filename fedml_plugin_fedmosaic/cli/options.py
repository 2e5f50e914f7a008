"""Options that several commands share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fedml_plugin_fedmosaic.cli.errors import Settings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> bool:  # noqa: ARG001
    ctx.ensure_object(Settings).debug |= value
    if value:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return value


def debug_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--debug``."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show log messages, and the traceback of an error.",
    )(function)


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--cf`` and ``--set``."""
    for decorate in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one key, e.g. train_args.comm_round=2. May be repeated.",
        ),
        click.option(
            "--cf",
            "--yaml_config_file",
            "cf",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Configuration file (YAML); the bundled quickstart when omitted.",
        ),
    ):
        function = decorate(function)
    return function


def strategy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--algo`` and ``--backend``."""
    for decorate in (
        click.option("--backend", metavar="sp|MPI", help="Override comm_args.backend."),
        click.option("--algo", metavar="NAME", help="Override train_args.federated_optimizer."),
    ):
        function = decorate(function)
    return function
