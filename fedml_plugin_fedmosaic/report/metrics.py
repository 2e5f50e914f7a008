"""Reads a run folder: its clients, and the metrics of every strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.report.learning import Stream
from fedml_plugin_fedmosaic.report.records import (
    BASE,
    CLIENTS_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESUMES_FILE,
    SCHEDULE_FILE,
    ClientInfo,
    Resumption,
    Schedule,
    read_clients,
    read_events,
    read_json,
    read_resumptions,
    read_schedule,
)
from fedml_plugin_fedmosaic.report.strategy_metrics import StrategyMetrics, mean

__all__ = ["Run", "StrategyMetrics", "load_run", "mean", "with_stream"]


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        path: the folder.
        clients: ascending by id.
        strategies: name -> metrics, in order of appearance; ``base`` for the untouched models.
        main: the strategy that the run is about; None if nothing has run yet.
        config: the resolved configuration's text; empty if the file is not there.
        environment: versions, seed and platform; empty if the file is not there.
        resumptions: every life after the first, in order.
        schedule: when the clients' tasks arrive; empty if the file is not there.
    """

    path: Path
    clients: tuple[ClientInfo, ...]
    strategies: Mapping[str, StrategyMetrics]
    main: str | None
    config: str
    environment: Mapping[str, Any]
    resumptions: tuple[Resumption, ...] = ()
    schedule: Schedule = field(default_factory=dict)

    @property
    def ordered(self) -> tuple[str, ...]:
        """Strategy names as tables show them: base, the compared ones, the main one."""
        middle = [name for name in self.strategies if name not in (BASE, self.main)]
        first = [BASE] if BASE in self.strategies else []
        return (*first, *middle, *([self.main] if self.main else []))

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, the clients' own in client order first."""
        own = (task for client in self.clients for task in client.tasks)
        rest = sorted(
            event.task
            for metrics in self.strategies.values()
            for event in metrics.events
            if isinstance(event, ev.Evaluated)
        )
        return tuple(dict.fromkeys([*own, *rest]))


def _main_strategy(config: str, names: Sequence[str]) -> str | None:
    """The configured strategy, else the last one that is not the base model's evaluation."""
    try:
        sections = yaml.safe_load(config) or {}
        configured = str(sections["train_args"]["federated_optimizer"]).lower()
    except (yaml.YAMLError, KeyError, TypeError):
        configured = ""
    if configured in names:
        return configured
    return next((name for name in reversed(names) if name != BASE), None)


def with_stream(
    strategies: Mapping[str, StrategyMetrics],
    clients: Sequence[ClientInfo],
    schedule: Schedule,
) -> dict[str, StrategyMetrics]:
    """The same strategies, told of the clients' data over time and of the base models' scores."""
    base = strategies.get(BASE)
    stream = Stream(
        tasks={client.client_id: client.tasks for client in clients},
        rounds=schedule,
        untrained={}
        if base is None
        else {
            client_id: {task: event.value for task, event in row.items()}
            for client_id, row in base.final_scores().items()
        },
    )
    return {name: replace(metrics, stream=stream) for name, metrics in strategies.items()}


def load_run(run_dir: Path) -> Run:
    """Reads a run folder, finished or not.

    Args:
        run_dir: the folder.

    Raises:
        DataError: ``metrics.jsonl`` or ``clients.json`` is missing, or a file is damaged (file and
            line).
    """
    events = read_events(run_dir / METRICS_FILE)
    # While a run of several ranks goes on, each rank writes a file of its own.
    for path in sorted(run_dir.glob("metrics.rank*.jsonl")):
        events += read_events(path)
    clients = read_clients(run_dir / CLIENTS_FILE)
    grouped: dict[str, list[ev.Event]] = {}
    for event in events:
        grouped.setdefault(event.strategy, []).append(event)
    schedule = read_schedule(run_dir / SCHEDULE_FILE, clients)
    config_path = run_dir / CONFIG_FILE
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    return Run(
        path=run_dir,
        clients=clients,
        strategies=with_stream(
            {name: StrategyMetrics(name, tuple(group)) for name, group in grouped.items()},
            clients,
            schedule,
        ),
        main=_main_strategy(config, list(grouped)),
        config=config,
        environment=read_json(run_dir / ENVIRONMENT_FILE, required=False) or {},
        resumptions=read_resumptions(run_dir / RESUMES_FILE),
        schedule=schedule,
    )
