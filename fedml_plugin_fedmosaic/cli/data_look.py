"""``fedmosaic data show|stats|verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedml_plugin_fedmosaic.cli.options import config_options, debug_option

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.config.sections import DataConfig
    from fedml_plugin_fedmosaic.data.scenario import ScenarioClient

_MAX_SHOWN = 20


def _data_config(what: str | None, cf: Path | None, overrides: tuple[str, ...]) -> DataConfig:
    """The data that a command means: a scenario file, a configuration, or ``--cf``."""
    from fedml_plugin_fedmosaic.config.loader import load_experiment
    from fedml_plugin_fedmosaic.config.sections import DataConfig
    from fedml_plugin_fedmosaic.core.errors import ConfigError

    if what is not None and cf is not None:
        raise ConfigError(f"{what} and --cf {cf} are both given; give one of them")
    if what is None or what.endswith((".yaml", ".yml")):
        return load_experiment(cf if what is None else Path(what), overrides).data
    path = Path(what).expanduser()
    if path.suffix == ".json" and path.is_file():
        # Scenarios are beside dataset/, in a folder of their own or not.
        for root in path.resolve().parents[:3]:
            if (root / "dataset").is_dir():
                return DataConfig(source="drake", root=str(root), scenario=str(path.resolve()))
        raise ConfigError(
            f"{what}: expected a folder dataset/ beside the scenario or above it, got none",
            hint="name a configuration, whose data.root says where the data are",
        )
    raise ConfigError(
        f"{what}: expected a configuration (.yaml) or a scenario (.json), got "
        + ("something else" if path.exists() else "no such file")
    )


@click.command()
@click.argument("what", required=False, metavar="[SCENARIO|CONFIG]")
@config_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("data.html"),
    show_default=True,
    metavar="FILE",
    help="Page to write.",
)
@click.option(
    "--samples",
    type=click.IntRange(1, 50),
    default=3,
    show_default=True,
    metavar="N",
    help="Samples per task.",
)
@debug_option
def show(
    *, what: str | None, cf: Path | None, overrides: tuple[str, ...], out: Path, samples: int
) -> None:
    """Write a page with samples of every client and task: images, questions and answers.

    \b
    Examples:
      fedmosaic data show configs/drake_lite/dynamic.yaml
      fedmosaic data show drake/scenarios/mine.json --out mine.html --samples 6
      fedmosaic data show                               the bundled quickstart
    """
    from fedml_plugin_fedmosaic.core.registry import DATASETS
    from fedml_plugin_fedmosaic.report.gallery import write_gallery

    config = _data_config(what, cf, overrides)
    click.echo(write_gallery(out, DATASETS[config.source](config), num_samples=samples))


@click.command()
@click.argument("what", required=False, metavar="[SCENARIO|CONFIG]")
@config_options
@debug_option
def stats(*, what: str | None, cf: Path | None, overrides: tuple[str, ...]) -> None:
    """Print sizes of the tasks, images per sample, and how often the commonest answer is right.

    \b
    Example:
      fedmosaic data stats configs/drake_lite/static.yaml
    """
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.core.registry import DATASETS
    from fedml_plugin_fedmosaic.data.stats import stats_table

    config = _data_config(what, cf, overrides)
    print_table(stats_table(DATASETS[config.source](config)))


@click.command()
@click.argument("what", required=False, metavar="[FOLDER|SCENARIO|CONFIG]")
@config_options
@debug_option
def verify(*, what: str | None, cf: Path | None, overrides: tuple[str, ...]) -> None:
    """Check every sample: images exist and decode, marks match, the answer is among the choices.

    FOLDER holds dataset/; all files in it are checked. With a scenario or a configuration, those of
    its tasks are. Ends with exit code 2 if something is wrong.

    \b
    Examples:
      fedmosaic data verify drake
      fedmosaic data verify configs/drake/small.yaml
    """
    from rich.console import Console
    from rich.progress import Progress

    from fedml_plugin_fedmosaic.core.errors import DataError
    from fedml_plugin_fedmosaic.data.places import folder_and_clients
    from fedml_plugin_fedmosaic.data.verify import verify as check

    no_clients: tuple[ScenarioClient, ...] = ()
    root, clients = Path(what or "").expanduser(), no_clients
    if what is None or not root.is_dir():
        root, clients = folder_and_clients(_data_config(what, cf, overrides))
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("samples", total=None)
        result = check(
            root, clients, lambda done, total: bar.update(task, completed=done, total=total)
        )
    for problem in result.problems[:_MAX_SHOWN]:
        click.echo(str(problem))
    if len(result.problems) > _MAX_SHOWN:
        click.echo(f"... and {len(result.problems) - _MAX_SHOWN} more")
    counted = (
        f"{result.num_samples} samples in {result.num_files} files, {result.num_images} images"
    )
    if result.problems:
        raise DataError(
            f"{len(result.problems)} problems in {counted}",
            hint="correct or remove these samples, or fetch the files again",
        )
    click.echo(f"{counted}: all well")
