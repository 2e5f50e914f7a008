"""What is to be fetched: the experiments that a file means, or a whole published benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.config.yamlfile import read_document
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.core.registry import SOURCES
from fedml_plugin_fedmosaic.data.sources import DrakeSource, bundled_tasks
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepSpec, make_plan, read_sweep_file


def experiments_of(files: Sequence[Path | None], overrides: Sequence[str]) -> list[Experiment]:
    """The experiments of configurations and sweep files.

    Args:
        files: YAML files; the bundled quickstart for None.
        overrides: ``--set`` texts for all of them.

    Raises:
        ConfigError: a file, or an option, is wrong.
    """
    found: list[Experiment] = []
    for path in files:
        if path is None or "grid" not in read_document(path).data:
            found.append(load_experiment(path, overrides))
            continue
        spec: SweepSpec = read_sweep_file(path)
        plan = make_plan(spec)
        found += plan.experiments.values() or [plan.base]
    return found


def fetch_benchmark(
    name: str,
    root: Path,
    datasets: Sequence[str],
    repository: str | None,
    say: Callable[[str], None],
) -> Path:
    """Fetches the data sets of all bundled scenarios of a benchmark.

    Args:
        name: ``drake`` or ``hflb``.
        root: folder for the data; made if it is not there.
        datasets: only these; all when empty.
        repository: another data set repository on the hub.
        say: is told what happens.

    Returns:
        ``root``.

    Raises:
        ConfigError: no such benchmark, or it has no such data set.
        DataError: the folder cannot be written, or something cannot be fetched.
    """
    tasks = bundled_tasks(name) if name in ("drake", "hflb") else ()
    if not tasks:
        raise ConfigError(
            f"{name!r} is no published benchmark and no YAML file",
            hint="write drake, hflb, or the name of a configuration",
        )
    known = list(dict.fromkeys(task.dataset for task in tasks))
    if unknown := [dataset for dataset in datasets if dataset not in known]:
        raise ConfigError(f"{name} has no data set {unknown[0]!r}; it has {', '.join(known)}")
    source: DrakeSource = SOURCES[name]()
    try:
        (root / "dataset").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{root} cannot be written: {error.strerror}") from error
    wanted = [task for task in tasks if not datasets or task.dataset in datasets]
    source.fetch_tasks(root, wanted, repository, say)
    return root
