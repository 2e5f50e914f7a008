"""Scenario files of DRAKE-lite: who has which model and tasks.

The mixes of models follow DRAKE's files: one model for all, a small and a large one of a family
(small for clients 0, 1, 8 and 9), and both families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedml_plugin_fedmosaic.data.lite.tasks import LiteTask, Variant, clients_of, tasks_of
from fedml_plugin_fedmosaic.data.scenario import ScenarioClient

SMALL, LARGE, OTHER = "lite-llama-small", "lite-llama-large", "lite-qwen2-small"
"""The base models that the scenarios name."""

MIXES: Mapping[str, Sequence[str]] = {
    "homogeneous": [SMALL] * 10,
    "heterogeneous": [SMALL, SMALL, *[LARGE] * 6, SMALL, SMALL],
    "cross_family": [SMALL, SMALL, *[LARGE] * 3, *[OTHER] * 3, SMALL, LARGE],
}
"""Model of every client by scenario."""


def scenario_clients(variant: Variant, name: str) -> tuple[ScenarioClient, ...]:
    """The clients of a mix in :data:`MIXES` or of an unseen scenario, without a file.

    Raises:
        KeyError: there is no such scenario.
    """
    tasks = {task.name: task.spec for task in tasks_of(variant)}
    return tuple(
        ScenarioClient(
            client_id=client["client_id"],
            model_id=client["model_id"],
            tasks=tuple(
                tasks[f"{entry['dataset']}-{entry['subset_id']}"] for entry in client["datasets"]
            ),
        )
        for client in scenarios_of(variant)[name]
    )


def _entry(task: LiteTask) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "dataset": task.dataset,
        "subset_id": task.subset_id,
        "type": task.kind,
    }
    return {**entry, "metric": task.metric} if task.metric else entry


def _client(client_id: int, model: str, tasks: Sequence[LiteTask]) -> dict[str, Any]:
    return {
        "client_id": client_id,
        "model_id": model,
        "datasets": [_entry(task) for task in tasks],
    }


def scenarios_of(variant: Variant) -> dict[str, list[dict[str, Any]]]:
    """Scenarios by name, in the published format.

    ``unseen_new_visual_domain`` and ``unseen_new_task_type`` have one client per unseen task, as
    DRAKE's have; ``unseen`` has both.
    """
    clients = clients_of(variant)
    found = {
        name: [
            _client(number, model, tasks)
            for number, (model, tasks) in enumerate(zip(models, clients, strict=True))
        ]
        for name, models in MIXES.items()
    }
    new = [task for task in tasks_of(variant) if task.unseen is not None]
    for kind in (None, "new visual domain", "new task type"):
        chosen = [task for task in new if kind in (None, task.unseen)]
        found["unseen" if kind is None else f"unseen_{kind.replace(' ', '_')}"] = [
            _client(number, SMALL, [task]) for number, task in enumerate(chosen)
        ]
    return found
