"""``fedmosaic models build-quickstart|build-drake-lite|fetch``."""

from __future__ import annotations

from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import config_options, debug_option


@click.group()
def command() -> None:
    """Fetch base models, or build the small bundled ones."""


@command.command("build-quickstart")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write."
)
@debug_option
def build_quickstart(*, out: Path) -> None:
    """Train the quickstart's base models again, from public data held out from every client.

    The wheel ships the result; this command reproduces it.

    \b
    Example:
      fedmosaic models build-quickstart --out models
    """
    from fedml_plugin_fedmosaic.runtime.pretrain import build_quickstart_models

    build_quickstart_models(out, log=click.echo)
    click.echo(out)


@command.command("build-drake-lite")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The built DRAKE-lite; the one below the cache when omitted.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write; 'cached:drake-lite' of configurations when omitted.",
)
@click.option("--model", "models", multiple=True, metavar="NAME", help="Only this one. Repeatable.")
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="N", help="Optimizer steps instead of 4,000."
)
@debug_option
def build_drake_lite(
    *, data: Path | None, out: Path | None, models: tuple[str, ...], steps: int | None
) -> None:
    """Train the base models of DRAKE-lite, from images that no client owns.

    Three small vision-language models: lite-llama-small, lite-llama-large and lite-qwen2-small.
    Takes 10 to 20 minutes per model on one core. Each comes with a card that tells its accuracy on
    every task.

    \b
    Examples:
      fedmosaic models build-drake-lite
      fedmosaic models build-drake-lite --model lite-llama-small --steps 1000
    """
    from fedml_plugin_fedmosaic.config.paths import cache_dir
    from fedml_plugin_fedmosaic.data.lite import lite_folder
    from fedml_plugin_fedmosaic.engine.tiny import LITE_ARCHITECTURES
    from fedml_plugin_fedmosaic.runtime.lite_pretrain import LiteRecipe, build_lite_models

    folder = data or lite_folder()
    target = out or cache_dir() / "models" / "drake-lite"
    recipe = LiteRecipe() if steps is None else LiteRecipe(steps=steps)
    names = models or tuple(LITE_ARCHITECTURES)
    build_lite_models(target, folder, recipe=recipe, names=names, log=click.echo)
    click.echo(target)


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@config_options
@debug_option
def fetch(*, names: tuple[str, ...], cf: Path | None, overrides: tuple[str, ...]) -> None:
    """Download base models into the cache, on a machine with internet.

    NAME is a model of the Hugging Face hub (owner/name), a configuration or a sweep file. Runs
    never download: they look into the same cache and say at once what is missing. HF_HOME names
    the cache; it must lie where the compute nodes see it.

    \b
    Examples:
      fedmosaic models fetch owner/model
      fedmosaic models fetch --cf configs/drake/small.yaml
      fedmosaic models fetch configs/sweeps/cross_family.yaml
    """
    from fedml_plugin_fedmosaic.cli.fetching import experiments_of
    from fedml_plugin_fedmosaic.config.paths import hub_cache
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.engine.hub import fetch_model, is_hub_id

    files: list[Path | None] = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    wanted = [name for name in names if Path(name) not in files]
    if wrong := [name for name in wanted if not is_hub_id(name)]:
        raise ConfigError(
            f"{wrong[0]!r} is no model of the hub and no YAML file", hint="write owner/name"
        )
    if cf is not None or not names:
        files.append(cf)
    for experiment in experiments_of(files, overrides):
        wanted += [spec.path for spec in experiment.models.values() if is_hub_id(spec.path)]
    for hub_id in dict.fromkeys(wanted):
        click.echo(f"{hub_id}  {fetch_model(hub_id)}")
    if not wanted:
        click.echo("nothing to fetch: all models are bundled or folders")
    else:
        click.echo(f"cache     {hub_cache()}; compute nodes must see it (HF_HOME)")
