"""Clients by the data sets of their tasks, for axes and separators."""

from __future__ import annotations

from collections.abc import Sequence

from fedml_plugin_fedmosaic.report.metrics import Run
from fedml_plugin_fedmosaic.report.records import ClientInfo


def group_of(client: ClientInfo) -> str:
    """The data sets of a client's tasks (a task is ``<dataset>-<subset>``)."""
    return ", ".join(dict.fromkeys(task.rpartition("-")[0] or task for task in client.tasks))


def by_group(run: Run) -> list[ClientInfo]:
    """Clients with those of one group side by side, groups in order of their first client."""
    first: dict[str, int] = {}
    for client in run.clients:
        first.setdefault(group_of(client), client.client_id)
    return sorted(run.clients, key=lambda c: (first[group_of(c)], c.client_id))


def separators(clients: Sequence[ClientInfo]) -> list[str]:
    """Group per client for separators; none if groups would not group anything."""
    groups = [group_of(client) for client in clients]
    return groups if 1 < len(set(groups)) < len(groups) else []


def client_name(client: ClientInfo) -> str:
    """Id and group, as axes show a client."""
    return f"{client.client_id}  {group_of(client)}"
