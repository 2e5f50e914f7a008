"""Runs an algorithm of this plugin for a FedML main program."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedml_plugin_fedmosaic.core.errors import FedMosaicError
from fedml_plugin_fedmosaic.core.events import (
    Evaluated,
    Event,
    RoundFinished,
    RunFinished,
    RunStarted,
)
from fedml_plugin_fedmosaic.integrations.fedml.args import experiment_from_args
from fedml_plugin_fedmosaic.integrations.fedml.privacy import make_hooks
from fedml_plugin_fedmosaic.launch.env import end_job, mpi_world
from fedml_plugin_fedmosaic.report.html import write_report
from fedml_plugin_fedmosaic.report.tables import write_summary
from fedml_plugin_fedmosaic.runtime.federation import RunSummary, prepare_run
from fedml_plugin_fedmosaic.runtime.signals import stop_on_signals

LOG = logging.getLogger(__name__)


class Runner:
    """A run of ours in the shape of FedML's runners.

    Works in three ways: FedML's simulators make one when ``federated_optimizer`` is ours; a main
    program can call ``Runner(args).run()``; or hand it to FedML without any extension of FedML:
    ``FedMLRunner(args, device, dataset, model, algorithm_flow=Runner(args))``.

    Args:
        args: FedML's arguments (see :func:`experiment_from_args`).
        device: not used; the device follows from ``using_gpu`` and ``gpu_id``.
        dataset: not used; data come from ``data_args.data``.
        model: not used; models come from ``model_args.models``.
        client_trainer: not used; a warning says so.
        server_aggregator: not used; a warning says so.

    Attributes:
        experiment: the checked configuration.
        summary: what the run left behind; None before :meth:`run`.

    Raises:
        FedMosaicError: configuration, data and models do not fit together.
    """

    def __init__(
        self,
        args: Any,
        device: Any = None,
        dataset: Any = None,
        model: Any = None,
        client_trainer: Any = None,
        server_aggregator: Any = None,
    ) -> None:
        del device, dataset, model
        for name, value in (
            ("client_trainer", client_trainer),
            ("server_aggregator", server_aggregator),
        ):
            if value is not None:
                LOG.warning("%s is not used by federated_optimizer %s", name, _name(args))
        self.experiment = experiment_from_args(args)
        self.summary: RunSummary | None = None
        with self._guarded():
            self._prepared = prepare_run(
                self.experiment,
                sinks=(_log_event,) if mpi_world()[0] == 0 else (),
                hooks=make_hooks(self.experiment),
            )
        # With ``run.resume`` it was checked against the run's own.
        self.experiment = self._prepared.experiment

    def run(self) -> None:
        """Trains, evaluates and writes the run folder with its report.

        Raises:
            ClientFailure: a client failed; what finished before is in the run folder.
            RunInterrupted: SIGTERM or SIGUSR1 asked the run to stop; it can be resumed.
        """
        with self._guarded(), _visible_log():
            topology = self._prepared.topology
            if topology.size > 1 and mpi_world()[0] == 0:
                for label, value in topology.describe():
                    LOG.info("%s: %s", label, value)
            with stop_on_signals() as request:
                self._prepared.should_stop = request
                self.summary = self._prepared.execute()
            if mpi_world()[0] == 0:
                write_summary(self.summary.run_dir)
                LOG.info("report: %s", write_report(self.summary.run_dir))

    train = run
    """What FedML's single-process simulator calls."""

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Ends all ranks when one of them fails: the others would wait for it for ever."""
        try:
            yield
        except Exception as error:
            rank, size = mpi_world()
            # What every rank has found, rank 0 says and ends.
            if size > 1 and not (rank > 0 and getattr(error, "everywhere", False)):
                LOG.exception("rank %d failed", rank)
                end_job(error.exit_code if isinstance(error, FedMosaicError) else 1)
            raise


def _name(args: Any) -> str:
    return str(getattr(args, "federated_optimizer", "this algorithm"))


def _log_event(event: Event) -> None:
    """One plain line per round, and per client and own task at the end; the report has the rest."""
    if isinstance(event, RunStarted):
        LOG.info(
            "%s: %d clients, %d rounds, run folder %s",
            event.strategy,
            event.num_clients,
            event.num_rounds,
            event.run_dir,
        )
    elif isinstance(event, RoundFinished):
        LOG.info("%s: round %d took %.1f s", event.strategy, event.round_idx + 1, event.duration_s)
    elif isinstance(event, Evaluated) and event.final and event.scope == "self":
        LOG.info(
            "%s: client %d, own task %s, view %s: %s %.3f",
            event.strategy,
            event.client_id,
            event.task,
            event.view,
            event.metric,
            event.value,
        )
    elif isinstance(event, RunFinished):
        LOG.info("%s: finished in %.1f s", event.strategy, event.duration_s)


@contextmanager
def _visible_log() -> Iterator[None]:
    """Shows our log lines where the program has chosen no log level itself.

    FedML's own log set-up, which sends every print() to standard error, is not used; FedML's
    ``logging.info`` calls may have given the root logger a handler, at Python's default level.
    """
    root, ours = logging.getLogger(), logging.getLogger("fedml_plugin_fedmosaic")
    level = ours.level
    handler: logging.Handler | None = None
    if not ours.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        ours.addHandler(handler)
    if level == logging.NOTSET and root.level == logging.WARNING:
        ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        if handler is not None:
            ours.removeHandler(handler)


__all__ = ["Runner"]
