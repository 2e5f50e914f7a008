"""The bundled quickstart: a small federation on real images, built on first use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample
from fedml_plugin_fedmosaic.data.drake import load_drake
from fedml_plugin_fedmosaic.data.quickstart.build import SCENARIO, ensure_built

__all__ = ["load_quickstart"]


def load_quickstart(config: DataConfig) -> FederatedData:
    """Loads the bundled federation.

    Clients that share a task share its test set and split its training rows: the k-th holder of n
    gets rows k, k + n, k + 2n and so on.

    Args:
        config: ``scenario`` is the bundled one when omitted; ``root`` is a cache folder to build
            in (the user cache when omitted).

    Raises:
        DataError: the data cannot be built, or the scenario is wrong.
    """
    folder = ensure_built(None if config.root is None else Path(config.root).expanduser())
    data = load_drake(
        replace(
            config,
            source="drake",
            root=str(folder),
            scenario=config.scenario or SCENARIO,
            max_train_samples=None,
        )
    )
    owners: dict[str, list[int]] = {}
    for client in data.clients:
        for task in client.tasks:
            owners.setdefault(task.name, []).append(client.client_id)
    clients = tuple(_own_rows(client, owners, config.max_train_samples) for client in data.clients)
    return replace(data, clients=clients)


def _own_rows(client: ClientData, owners: dict[str, list[int]], limit: int | None) -> ClientData:
    train: list[tuple[Sample, ...]] = []
    for task, rows in zip(client.tasks, client.train, strict=True):
        ids = owners[task.name]
        train.append(rows[ids.index(client.client_id) :: len(ids)][:limit])
    return replace(client, train=tuple(train))
