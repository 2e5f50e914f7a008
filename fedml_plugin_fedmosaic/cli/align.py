"""``fedmosaic align``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedml_plugin_fedmosaic.cli.options import config_options, debug_option

if TYPE_CHECKING:
    from rich.console import Console

    from fedml_plugin_fedmosaic.config.sections import Experiment
    from fedml_plugin_fedmosaic.runtime.alignment_files import AlignmentManifest

_STAGES = {"A": "fitting A", "B": "turning B", "check": "checking"}


@click.command()
@config_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the files; adapter.alignment of the configuration when omitted.",
)
@click.option(
    "--anchor",
    metavar="NAME|PATH",
    help="Model whose coordinates the others take; the smallest when omitted.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Model to align, instead of a configuration's. May be repeated.",
)
@click.option(
    "--data",
    "sources",
    multiple=True,
    metavar="FILE|DIR|train",
    help="Public samples: a JSON file or folder in the DRAKE layout, or 'train'.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=4),
    default=5000,
    show_default=True,
    help="Samples that A is fitted on, at most.",
)
@click.option(
    "--output-samples",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Those among them that B is turned with.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Passes over the samples.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Samples per update of A.",
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Learning rate of A; by the number of updates when omitted.",
)
@click.option(
    "--positions",
    type=click.Choice(["auto", "all", "supervised"]),
    default="auto",
    show_default=True,
    help="Token positions that are compared.",
)
@click.option(
    "--match-scale/--published-scale",
    default=True,
    show_default=True,
    help="Allow for models with larger activations, or compare as published.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the anchor's A and B and of the order of samples.",
)
@click.option("--force", is_flag=True, help="Make files again that are there.")
@debug_option
def command(
    *,
    cf: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    anchor: str | None,
    models: tuple[str, ...],
    sources: tuple[str, ...],
    force: bool,
    **how: Any,
) -> None:
    """Give models of different sizes or families common coordinates, once, before a run.

    PQ-LoRA shares only the small P and Q between architectures. For them to mean the same
    everywhere, A and B of every model are fitted to those of one anchor, on public samples that
    stream past both. The result is one small file per model; a run takes them with
    adapter.alignment: DIR, and refuses files of other models. Calling it again costs nothing.

    Public samples are, in this order: --data; files dataset/NAME/public/*.json of the
    configuration's data root; the pretraining images of the bundled quickstart.

    \b
    Examples:
      fedmosaic align --cf mine.yaml                   smallest model as anchor, all others
      fedmosaic align --cf mine.yaml --data train      on the clients' samples (simulation only)
      fedmosaic align --anchor small=models/a --model big=models/b --data chat.json \\
                      --out aligned --set adapter.rank=16 --set adapter.num_blocks=4
    """
    from rich.console import Console

    from fedml_plugin_fedmosaic.runtime.aligner import ModelAligner, public_data
    from fedml_plugin_fedmosaic.runtime.alignment_options import AlignOptions

    experiment, anchor = _experiment(cf, overrides, anchor, models)
    folder = out or _folder(experiment, cf)
    options = AlignOptions(
        num_samples=how["samples"],
        output_samples=how["output_samples"],
        epochs=how["epochs"],
        batch_size=how["batch_size"],
        learning_rate=how["lr"],
        positions=how["positions"],
        match_scale=how["match_scale"],
        seed=how["seed"],
    )
    if experiment.device.num_threads is not None:
        import torch

        torch.set_num_threads(experiment.device.num_threads)
    aligner = ModelAligner(
        experiment, public_data(experiment, sources), folder, anchor=anchor, options=options
    )
    console = Console()
    with _bars(console) as progress:
        aligner.run(
            force=force,
            progress=progress,
            done=lambda manifest, known: console.print(
                f"{manifest.model.name}: "
                + _standing(manifest, aligner.anchor)
                + (", was there already" if known else f", {manifest.duration_s:.1f} s"),
                markup=False,
                highlight=False,
            ),
        )
    _show(console, folder, experiment)


def _experiment(
    cf: Path | None, overrides: tuple[str, ...], anchor: str | None, models: tuple[str, ...]
) -> tuple[Experiment, str | None]:
    """The configuration, with its models replaced by those of the options."""
    from dataclasses import replace

    from fedml_plugin_fedmosaic.config.loader import load_experiment
    from fedml_plugin_fedmosaic.config.sections import ModelSpec
    from fedml_plugin_fedmosaic.core.errors import ConfigError

    experiment = load_experiment(cf, overrides)
    if not models:
        return experiment, anchor
    if anchor is None:
        raise ConfigError("--model needs --anchor: the model whose coordinates count")
    named = [_named(text) for text in (anchor, *models)]
    if len({name for name, _ in named}) < len(named):
        raise ConfigError(
            f"two models are called {named[0][0]!r}"
            if len(named) == 2
            else "two models have one name",
            hint="name them: --anchor small=PATH --model big=PATH",
        )
    known = experiment.models
    specs = {name: known.get(path) or ModelSpec(path=path) for name, path in named}
    return replace(experiment, models=specs), named[0][0]


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if equals:
        return name, path
    return Path(text).name if Path(text).is_dir() else text.removeprefix("bundled:"), text


def _standing(manifest: AlignmentManifest, anchor: str) -> str:
    if not manifest.is_anchor:
        return f"aligned with {manifest.anchor.name}"
    return "the anchor" if manifest.model.name == anchor else "an anchor of its own"


def _folder(experiment: Experiment, cf: Path | None) -> Path:
    chosen = experiment.adapter.alignment
    if chosen is not None and chosen != "bundled":
        return Path(chosen)
    return Path("alignments") / (cf.stem if cf is not None else "quickstart")


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[str], Callable[[str, int, int], None]] | None]:
    """Progress bars on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task("loading models", total=None)

        def of_model(name: str) -> Callable[[str, int, int], None]:
            progress.update(task, description=f"{name}: loading", completed=0, total=None)

            def show(stage: str, done: int, total: int) -> None:
                text = f"{name}: {_STAGES[stage]}"
                progress.update(task, description=text, completed=done, total=total)

            return show

        yield of_model


def _show(console: Console, folder: Path, experiment: Experiment) -> None:
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.report.alignment import (
        overfitting_table,
        quality_table,
        read_alignments,
        warnings_of,
        write_alignment_page,
    )

    manifests = read_alignments(folder)
    print_table(quality_table(manifests), console)
    fitted = overfitting_table(manifests)
    if fitted is not None:
        print_table(fitted, console)
    for line in warnings_of(manifests):
        console.print(
            f"warning: {line}",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=not console.is_terminal,
        )
    page = write_alignment_page(folder)
    click.echo(f"files  {folder}")
    click.echo(f"plots  {page}")
    if experiment.adapter.alignment is None:
        click.echo(f"to use them: adapter_args: {{adapter: {{alignment: {folder}}}}}")
