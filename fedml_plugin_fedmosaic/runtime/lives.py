"""A run may live several times: what one life knows of the earlier ones, and how it ends early."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.config.compare import settings_of
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import RunInterrupted
from fedml_plugin_fedmosaic.engine.base import ShouldStop
from fedml_plugin_fedmosaic.runtime.journal import ScoreKey
from fedml_plugin_fedmosaic.runtime.signals import never
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore


def _nothing() -> None:
    """Nothing has to be flushed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One process's part of a run.

    Attributes:
        run_dir: the run folder.
        known: scores that earlier lives have reported.
        should_stop: whether a rank of this group was asked to stop; its ranks ask together.
        sync: makes the events that were emitted so far outlive a power cut.
    """

    run_dir: Path
    known: Collection[ScoreKey] = ()
    should_stop: ShouldStop = never
    sync: Callable[[], None] = _nothing

    def go_on(self, comm: Communicator, *, stopped: bool) -> None:
        """Ends the run on every rank if any rank has stopped; all ranks call it.

        A rank that was not asked to stop arrives here when its part of the round is done, so
        nobody waits for a rank that is gone, and nothing that was computed is lost.

        Raises:
            RunInterrupted: on every rank.
        """
        if not any(json.loads(text) for text in comm.share(json.dumps(stopped))):
            return
        error = RunInterrupted(
            f"stopped as a signal asked; everything is saved in {self.run_dir}",
            hint=f"go on with: fedmosaic run --resume {self.run_dir}",
        )
        error.everywhere = True
        raise error


def experiment_digest(experiment: Experiment) -> str:
    """Digest of the settings that a checkpoint depends on (see :func:`config.compare`)."""
    text = json.dumps(settings_of(experiment), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def open_store(
    run_dir: Path, strategy: str, experiment: Experiment, comm: Communicator
) -> CheckpointStore:
    """The checkpoints of one strategy of a run, as this rank may use them."""
    return CheckpointStore(
        run_dir / "checkpoints" / strategy,
        keep_last=experiment.run.keep_last,
        rank=comm.rank,
        writes=comm.is_leader,
        experiment=experiment_digest(experiment),
        num_rounds=experiment.train.comm_round,
    )
