"""A client's personal model as a plain PEFT LoRA adapter that stock ``peft`` loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fedml_plugin_fedmosaic.adapters.export import export_plain_lora
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import CheckpointError, ConfigError
from fedml_plugin_fedmosaic.core.types import View
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.runtime.client import EnginePool
from fedml_plugin_fedmosaic.runtime.setup import build_strategy
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore


def export_client(run_dir: Path, client_id: int, out: Path, *, strategy: str | None = None) -> Path:
    """Writes one client's last checkpoint as a stock PEFT LoRA adapter folder.

    Args:
        run_dir: a finished (or interrupted) run.
        client_id: whose model.
        out: folder to write; must not exist or be empty.
        strategy: which strategy of the run; the main one by default.

    Returns:
        ``out``.

    Raises:
        ConfigError: not a run folder, no such client, or ``out`` is in use.
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
    pool = EnginePool(experiment, {model: bundle}, chosen.adapter)
    try:
        engine = pool.engine(model)
        engine.adapter.load(checkpoint.clients[client_id].adapter)
        export_plain_lora(engine.adapter, out, View(chosen.eval_view))
    finally:
        pool.close()
    return out
