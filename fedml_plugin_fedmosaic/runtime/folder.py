"""Which folder a run takes, and what it says there before it trains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.config.loader import dump_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.launch.base import LAUNCH_FILES, STARTED_FILE
from fedml_plugin_fedmosaic.launch.topology import Topology
from fedml_plugin_fedmosaic.runtime.arrivals import Arrivals
from fedml_plugin_fedmosaic.runtime.environment import collect_environment
from fedml_plugin_fedmosaic.runtime.lock import check_unlocked
from fedml_plugin_fedmosaic.runtime.resume import CLIENTS_FILE, check_rounds
from fedml_plugin_fedmosaic.runtime.setup import together
from fedml_plugin_fedmosaic.runtime.treefile import write_atomic, write_error


def claim_run_dir(experiment: Experiment, run_dir: Path | None) -> Path:
    """The folder of a new run; nothing is made.

    Args:
        experiment: names the folder if ``run_dir`` does not.
        run_dir: must not exist, or hold nothing but what a launcher puts there before the run
            starts. The next free one under ``run.root`` when omitted.

    Raises:
        ConfigError: the folder has something in it.
    """
    if run_dir is None and experiment.run.name is not None:
        run_dir = Path(experiment.run.root) / experiment.run.name
    if run_dir is not None:
        if run_dir.exists() and not _is_free(run_dir):
            raise _taken(run_dir)
        return run_dir
    root = Path(experiment.run.root)
    stem = f"{experiment.algo}-{experiment.data.source}"
    number = 1
    while (root / f"{stem}-{number:03d}").exists():
        number += 1
    return root / f"{stem}-{number:03d}"


def check_not_started(run_dir: Path) -> None:
    """Whether no run has begun in a folder.

    Raises:
        ConfigError: one has.
    """
    if (run_dir / STARTED_FILE).exists():
        raise _taken(run_dir)


def _taken(run_dir: Path) -> ConfigError:
    return ConfigError(
        f"the run folder {run_dir} exists and is not an empty folder",
        hint="choose another --run-dir; results are never overwritten",
    )


def _is_free(folder: Path) -> bool:
    return folder.is_dir() and all(path.name in LAUNCH_FILES for path in folder.iterdir())


def agree_on_folder(
    comm: Communicator,
    experiment: Experiment,
    data: FederatedData,
    run_dir: Path | None,
    *,
    resume: bool,
) -> Path:
    """The run folder, the same on all ranks; all ranks call it.

    Args:
        comm: all ranks of the job.
        experiment: the run.
        data: of the run.
        run_dir: as in :func:`claim_run_dir`; the run's own with ``resume``.
        resume: go on with the run in ``run_dir``.

    Raises:
        ConfigError: the folder has something in it; with ``resume``, it cannot have that number of
            rounds.
        RunInUse: with ``resume``: another process runs in it.
    """

    # Rank 0 chooses, because another program may take a free folder between two ranks' looks.
    def claim() -> Path | None:
        if not resume:
            return claim_run_dir(experiment, run_dir) if comm.rank == 0 else None
        if run_dir is None:
            raise ConfigError("a run is resumed from its folder, but none is given")
        if comm.rank == 0:
            check_unlocked(run_dir)
        check_rounds(run_dir, experiment, data)
        return run_dir

    return Path(comm.share(str(together(comm, claim)))[0])


SCHEDULE_FILE = "schedule.json"


def schedule_of(experiment: Experiment, data: FederatedData) -> dict[str, list[list[int] | None]]:
    """When the samples of each client's tasks arrive, for ``schedule.json``.

    Returns:
        Client id as text -> for each task the first and the last 0-based round with its samples;
        None for a task of which nothing arrives.
    """
    count = experiment.train.comm_round
    return {
        str(client.client_id): [
            None if rounds is None else list(rounds)
            for rounds in Arrivals(client, experiment).task_rounds(count)
        ]
        for client in data.clients
    }


def write_header(
    run_dir: Path,
    experiment: Experiment,
    topology: Topology,
    clients: Sequence[Mapping[str, Any]] | None,
    data: FederatedData,
) -> None:
    """Writes what a run folder says of its run before anything is trained.

    Args:
        run_dir: made if need be.
        experiment: the run.
        topology: which ranks train whom.
        clients: for ``clients.json``; None keeps that file and ``environment.json`` as they are.
        data: of the run, for ``schedule.json``.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(run_dir, error) from error
    write_atomic(run_dir / STARTED_FILE, dump_experiment(experiment).encode())
    write_atomic(run_dir / "topology.json", json.dumps(topology.to_json(), indent=1).encode())
    schedule = schedule_of(experiment, data)
    write_atomic(run_dir / SCHEDULE_FILE, json.dumps(schedule).encode())
    if clients is None:
        return
    environment = collect_environment(seed=experiment.common.random_seed)
    write_atomic(run_dir / "environment.json", json.dumps(environment, indent=1).encode())
    write_atomic(run_dir / CLIENTS_FILE, json.dumps(clients, indent=1).encode())
