"""A client's personal model as a plain PEFT LoRA adapter that stock ``peft`` loads."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from fedml_plugin_fedmosaic.adapters.export import export_plain_lora
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import CheckpointError, ConfigError
from fedml_plugin_fedmosaic.core.types import ClientState
from fedml_plugin_fedmosaic.core.work import Served
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.runtime.client import EnginePool, laid_over
from fedml_plugin_fedmosaic.runtime.setup import build_strategy
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore
from fedml_plugin_fedmosaic.strategies.base import Strategy

LOG = logging.getLogger(__name__)


def served_model(
    strategy: Strategy, state: ClientState, tasks: Sequence[str], task: str | None = None
) -> Served:
    """The model that a client answers with in the strategy's own view.

    Args:
        strategy: of the run.
        state: of the client.
        tasks: the client's own.
        task: the one to answer; None if all own tasks have the same model.

    Raises:
        ConfigError: the tasks have different models, so that one must be named.
    """
    found: dict[str, Served] = {
        name: strategy.client.serve(strategy.eval_view, name, state)
        for name in ([task] if task is not None else tasks)
    }
    served = list(found.values())
    if any(other.model != served[0].model for other in served):
        raise ConfigError(
            f"client {state.client_id} has a model for each of its tasks: {', '.join(found)}",
            hint="say which one with --task NAME",
        )
    if served[0].mixer:
        LOG.warning("the model is exported without what %s adds to its answers", served[0].mixer)
    return served[0]


def export_client(
    run_dir: Path,
    client_id: int,
    out: Path,
    *,
    strategy: str | None = None,
    task: str | None = None,
) -> Path:
    """Writes one client's last checkpoint as a stock PEFT LoRA adapter folder.

    Args:
        run_dir: a finished (or interrupted) run.
        client_id: whose model.
        out: folder to write; must not exist or be empty.
        strategy: which strategy of the run; the main one by default.
        task: which task's model, for strategies with a model per task.

    Returns:
        ``out``.

    Raises:
        ConfigError: not a run folder, no such client, ``out`` is in use, or a task must be named.
        CheckpointError: the client never trained, or its checkpoint is damaged.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.yaml")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder", hint="choose another --out")
    experiment = load_experiment(config)
    clients = {
        entry["client_id"]: entry for entry in json.loads((run_dir / "clients.json").read_text())
    }
    if client_id not in clients:
        raise ConfigError(f"{run_dir} has no client {client_id}; it has 0 to {max(clients)}")
    name = strategy or experiment.algo
    checkpoint = CheckpointStore(run_dir / "checkpoints" / name, keep_last=1).load()
    if client_id not in checkpoint.clients:
        raise CheckpointError(f"client {client_id} never took part in {name!r}: nothing to export")
    model = clients[client_id]["model"]
    bundle = load_model(model, experiment.models[model], torch.device("cpu"))
    chosen = build_strategy(name, experiment)
    state = checkpoint.clients[client_id]
    served = served_model(chosen, state, clients[client_id]["tasks"], task)
    pool = EnginePool(experiment, {model: bundle}, chosen.adapter)
    try:
        engine = pool.engine(model)
        engine.adapter.load(laid_over(state, served.model.overlay))
        export_plain_lora(engine.adapter, out, served.model.view)
    finally:
        pool.close()
    return out
