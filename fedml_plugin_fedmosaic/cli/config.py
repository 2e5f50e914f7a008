"""``fedmosaic config check|show|schema|reference|paper``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import config_options, debug_option, strategy_options


@click.group()
def command() -> None:
    """Check, show and explain configurations."""


@command.command()
@config_options
@strategy_options
@click.option(
    "--offline-ready",
    is_flag=True,
    help="Also check that models and data are there, so that no run needs the internet.",
)
@debug_option
def check(
    *,
    cf: Path | None,
    overrides: tuple[str, ...],
    algo: str | None,
    backend: str | None,
    offline_ready: bool,
) -> None:
    """Check a configuration and report every mistake at once.

    Looks at the file only; 'fedmosaic run --dry-run' also loads its data and models.

    \b
    Examples:
      fedmosaic config check --cf mine.yaml
      fedmosaic config check --cf mine.yaml --set adapter.rank=64
      fedmosaic config check --cf mine.yaml --offline-ready
    """
    from fedml_plugin_fedmosaic.config.loader import bundled_config, load_experiment

    experiment = load_experiment(cf, overrides, algo=algo, backend=backend)
    click.echo(
        f"{cf or bundled_config()}: correct ({experiment.algo} on {experiment.data.source}, "
        f"{experiment.train.comm_round} rounds, backend {experiment.comm.backend})"
    )
    if offline_ready:
        from fedml_plugin_fedmosaic.runtime.offline import require_offline

        require_offline(experiment)
        click.echo("models and data are there: a run needs no internet")


@command.command()
@config_options
@strategy_options
@debug_option
def show(
    *, cf: Path | None, overrides: tuple[str, ...], algo: str | None, backend: str | None
) -> None:
    """Print a complete configuration: the file's values and all defaults.

    \b
    Examples:
      fedmosaic config show > mine.yaml               start your own from the quickstart
      fedmosaic config show --cf mine.yaml --set comm_round=2
    """
    from fedml_plugin_fedmosaic.config.loader import dump_experiment, load_experiment

    experiment = load_experiment(cf, overrides, algo=algo, backend=backend)
    click.echo(dump_experiment(experiment), nl=False)


@command.command()
@debug_option
def schema() -> None:
    """Print the JSON schema of configuration files, for editors.

    \b
    Example:
      fedmosaic config schema > fedmosaic.schema.json
    """
    from fedml_plugin_fedmosaic.config.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@command.command()
@debug_option
def reference() -> None:
    """Explain every key: type, default, meaning (Markdown).

    \b
    Example:
      fedmosaic config reference | less
    """
    from fedml_plugin_fedmosaic.config.schema import reference_markdown

    click.echo(reference_markdown(), nl=False)


@command.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@debug_option
def strategies(*, folder: Path) -> None:
    """Write one page per strategy (Markdown) into a folder.

    Equations, source, options and cost, from the strategies' own texts.

    \b
    Example:
      fedmosaic config strategies docs/strategies
    """
    from fedml_plugin_fedmosaic.config.strategy_pages import strategy_page
    from fedml_plugin_fedmosaic.core.registry import STRATEGIES

    folder.mkdir(parents=True, exist_ok=True)
    for name in STRATEGIES:
        (folder / f"{name}.md").write_text(strategy_page(name), encoding="utf-8")
    click.echo(f"{len(STRATEGIES)} pages in {folder}")


@command.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR", required=False)
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Make the tables of this Markdown page anew, from the bundled configurations.",
)
@debug_option
def paper(*, folder: Path | None, page: Path | None) -> None:
    """Write the configurations and scenarios of the paper's experiments into a folder.

    They come with the package already; this writes them again, to be changed.

    \b
    Examples:
      fedmosaic config paper experiments
      fedmosaic config paper --page docs/reproduce.md
    """
    from fedml_plugin_fedmosaic.config.loader import bundled_config
    from fedml_plugin_fedmosaic.runtime.paper_files import document_text, write_paper_files

    if folder is None and page is None:
        raise click.UsageError("give a folder, or --page FILE")
    if folder is not None:
        for path in write_paper_files(folder):
            click.echo(path)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        page.write_text(document_text(text, bundled_config().parent), encoding="utf-8")
        click.echo(page)
