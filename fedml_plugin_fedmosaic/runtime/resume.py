"""Going on with a run from its folder: is it the same run, and where does it stand?"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.config.compare import differences
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import CheckpointError, ConfigError, DataError
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.runtime.arrivals import Arrivals
from fedml_plugin_fedmosaic.runtime.journal import Kept, take_up
from fedml_plugin_fedmosaic.runtime.lives import open_store
from fedml_plugin_fedmosaic.runtime.treefile import remove_leftovers, write_atomic, write_error

LOG = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CLIENTS_FILE = "clients.json"
RESUMES_FILE = "resumes.jsonl"


def resumed_experiment(
    run_dir: Path,
    cf: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    algo: str | None = None,
    backend: str | None = None,
) -> Experiment:
    """The configuration of a run that goes on.

    Args:
        run_dir: its folder.
        cf: another configuration file; the run's own when None.
        overrides: ``section.key=value`` texts.
        algo: as on the command line.
        backend: as on the command line.

    Returns:
        The run's own configuration with what may be changed: backend and ranks, threads, number
        of rounds (see :func:`check_rounds`), and where and how often results are saved.

    Raises:
        ConfigError: not a run folder, or something else differs; every difference is listed.
    """
    old = _own_experiment(run_dir)
    if algo is not None and algo.lower() == old.algo:
        # Naming the strategy anew would drop the options that the file gives it.
        algo = None
    new = load_experiment(cf or run_dir / CONFIG_FILE, overrides, algo=algo, backend=backend)
    return _same(run_dir, old, new)


def take_folder(
    experiment: Experiment, run_dir: Path | None
) -> tuple[Experiment, Path | None, bool]:
    """Follows ``run.resume``.

    Args:
        experiment: may name the folder of a run to go on with.
        run_dir: the folder that the caller asks for.

    Returns:
        The experiment without ``run.resume``, the run folder, and whether its run goes on.

    Raises:
        ConfigError: not a run folder, the experiment differs from the run's in more than a resumed
            run may change (every difference is listed), or the caller asks for another folder.
    """
    if experiment.run.resume is None:
        return experiment, run_dir, False
    folder = Path(experiment.run.resume)
    if run_dir is not None:
        raise ConfigError(
            f"--run-dir {run_dir} cannot be combined with run.resume: {folder}",
            hint="a resumed run goes on in its own folder",
        )
    return _same(folder, _own_experiment(folder), experiment), folder, True


def _own_experiment(run_dir: Path) -> Experiment:
    own = run_dir / CONFIG_FILE
    if not own.is_file():
        raise ConfigError(
            f"--resume {run_dir}: not a run folder, it has no {CONFIG_FILE}",
            hint="give the folder that the run printed; a run that never began is started anew",
        )
    return load_experiment(own)


def _same(run_dir: Path, old: Experiment, new: Experiment) -> Experiment:
    """The new one, if it differs in nothing that changes results; its folder is settled."""
    found = differences(old, new)
    if found:
        lines = [
            f"{key}: the run has {before!r}, asked for {after!r}"
            for key, (before, after) in found.items()
        ]
        raise ConfigError(
            "\n".join([f"{run_dir} was made with another configuration", *lines]),
            hint="leave --cf and --set out to go on with the run's own, or start a new run",
        )
    # The folder's config.yaml, taken for a new run, must not lead back to this one.
    return replace(new, run=replace(new.run, resume=None))


def check_same_clients(run_dir: Path, clients: Sequence[Mapping[str, Any]]) -> None:
    """Whether data and models are still those of the run.

    Args:
        run_dir: its folder.
        clients: what ``clients.json`` would hold today.

    Raises:
        CheckpointError: a client's model, tasks or number of samples has changed.
    """
    path = run_dir / CLIENTS_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or missing: {error}") from error
    after = json.loads(json.dumps(clients))
    if before == after:
        return
    # Different numbers of clients are named below; here those that both lists have are compared.
    changed = [
        f"client {new.get('client_id')}: {key} was {old.get(key)!r}, is {new.get(key)!r}"
        for old, new in zip(before, after, strict=False)
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    raise CheckpointError(
        f"{run_dir}: data or models have changed since: "
        f"{changed[0] if changed else f'{len(before)} clients were, {len(after)} are'}",
        hint="resume with the data and models of the run",
    )


def check_rounds(run_dir: Path, experiment: Experiment, data: FederatedData) -> None:
    """Whether the number of rounds may be changed: not if it would change what has happened.

    The rounds share out the samples, and the learning rate may fall over them.

    Raises:
        ConfigError: the rounds that are done would have been others.
    """
    old = load_experiment(run_dir / CONFIG_FILE)
    before, after = old.train.comm_round, experiment.train.comm_round
    if before == after:
        return
    done = _rounds_begun(run_dir)
    if done == 0:
        return
    asked = f"comm_round {after} instead of {before}, with {done} round(s) begun"
    if done > after:
        raise ConfigError(f"{asked}: they cannot be taken back", hint="start a new run")
    if experiment.optim.final_lr_fraction != 1.0:
        raise ConfigError(
            f"{asked}: optim.final_lr_fraction {experiment.optim.final_lr_fraction:g} makes their "
            "learning rates depend on the number of rounds",
            hint="start a new run",
        )
    for client in data.clients:
        try:
            same = Arrivals(client, old).shares(done) == Arrivals(client, experiment).shares(done)
        except DataError as error:
            raise ConfigError(f"{asked}: {error.message}", hint=error.hint) from error
        if not same:
            raise ConfigError(
                f"{asked}: client {client.client_id}'s samples are shared out over all rounds, so "
                "other ones would have arrived in the rounds that are done",
                hint="start a new run",
            )


def _rounds_begun(run_dir: Path) -> int:
    """Rounds that any strategy has begun, also an unfinished one."""
    names = (run_dir / "checkpoints").glob("*/*-round-*")
    manifests = (run_dir / "checkpoints").glob("*/round-*.json")
    return max(
        (int(path.stem.rpartition("-")[2]) for path in (*names, *manifests)),
        default=0,
    )


def begin_again(
    run_dir: Path,
    strategies: Sequence[str],
    experiment: Experiment,
    comm: Communicator,
    *,
    base: str,
    from_round: int | None,
) -> None:
    """Cleans up after the earlier life and forgets what is to be done again; rank 0 calls it.

    Args:
        run_dir: the run folder.
        strategies: of the run, in order.
        experiment: the run.
        comm: all ranks of the job.
        base: name under which the base models are evaluated.
        from_round: number of rounds (of the strategy that is not finished) to keep; all saved
            ones when None.

    Raises:
        CheckpointError: the round is not there, a file is damaged, or the folder is read-only.
    """
    stores = {name: open_store(run_dir, name, experiment, comm) for name in strategies}
    open_ones = [name for name, store in stores.items() if store.finished() is None]
    current = open_ones[0] if open_ones else strategies[-1]
    rounds = stores[current].rounds()
    if from_round is not None and from_round > 0 and from_round - 1 not in rounds:
        found = ", ".join(str(index + 1) for index in rounds) or "none"
        raise CheckpointError(
            f"--from-round {from_round}: {current} has no such checkpoint; found: {found}",
            hint="run.keep_last says how many are kept; --from-round 0 starts the strategy anew",
        )
    remove_leftovers(run_dir)
    for store in stores.values():
        store.tidy()
    if from_round is not None:
        stores[current].rewind(from_round - 1)
    kept = Kept(
        finished=frozenset(name for name, store in stores.items() if store.finished() is not None),
        rounds={name: max(store.rounds(), default=-1) for name, store in stores.items()},
    )
    take_up(run_dir, kept, base)
    _note(run_dir, current, kept, comm.size)


def _note(run_dir: Path, current: str, kept: Kept, ranks: int) -> None:
    """One line per life in ``resumes.jsonl``, for people."""
    path = run_dir / RESUMES_FILE
    finished = len(kept.finished)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "strategy": current,
        "rounds_done": kept.rounds.get(current, -1) + 1,
        "strategies_done": finished,
        "ranks": ranks,
    }
    try:
        before = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise write_error(path, error) from error
    write_atomic(path, before + json.dumps(entry).encode() + b"\n")
