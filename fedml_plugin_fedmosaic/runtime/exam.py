"""Published exams for the clients' models of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import CheckpointError, ConfigError
from fedml_plugin_fedmosaic.core.registry import EXAMS
from fedml_plugin_fedmosaic.core.types import View
from fedml_plugin_fedmosaic.engine.exams import Exam, ExamResult
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.runtime.client import EnginePool, laid_over
from fedml_plugin_fedmosaic.runtime.export import served_model
from fedml_plugin_fedmosaic.runtime.setup import build_strategy, choose_device
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore

RESULTS = "exams.json"


def take_exam(
    run_dir: Path,
    exam: str,
    folder: Path,
    *,
    clients: Collection[int] = (),
    strategy: str | None = None,
    base: bool = True,
    questions: int | None = None,
    say: Callable[[str, ExamResult], None],
) -> dict[str, ExamResult]:
    """Puts an exam to clients' last checkpoints, and to their untouched base models.

    Args:
        run_dir: a finished (or interrupted) run.
        exam: member of the EXAMS shelf: ``gsm8k`` or ``mmlu``.
        folder: with the exam's published files.
        clients: ids; all when empty.
        strategy: which strategy of the run; the main one by default.
        base: also ask the base models.
        questions: limit, see the exam; all when None.
        say: told each result as it comes.

    Returns:
        ``client N`` or ``base NAME`` -> result; also added to ``exams.json`` of the run folder.

    Raises:
        ConfigError: not a run folder, no such client or exam.
        CheckpointError: a client never trained, or a checkpoint is damaged.
        DataError: the exam's files are missing or damaged.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.yaml")
    if exam not in EXAMS:
        raise ConfigError(f"there is no exam {exam!r}; known: {', '.join(EXAMS)}")
    experiment = load_experiment(config)
    entries = {
        entry["client_id"]: entry
        for entry in json.loads((run_dir / "clients.json").read_text(encoding="utf-8"))
    }
    wanted = sorted(clients or entries)
    if missing := [client for client in wanted if client not in entries]:
        raise ConfigError(f"{run_dir} has no client {missing[0]}; it has 0 to {max(entries)}")
    name = strategy or experiment.algo
    chosen = build_strategy(name, experiment)
    checkpoint = CheckpointStore(run_dir / "checkpoints" / name, keep_last=1).load()
    if absent := [client for client in wanted if client not in checkpoint.clients]:
        raise CheckpointError(f"client {absent[0]} never took part in {name!r}")
    paper: Exam = EXAMS[exam](folder, questions, experiment.common.random_seed)
    size = experiment.evaluation.batch_size
    results: dict[str, ExamResult] = {}

    def note(label: str, result: ExamResult) -> None:
        results[label] = result
        say(label, result)

    for model in dict.fromkeys(entries[client]["model"] for client in wanted):
        device = choose_device(experiment, 1)
        bundle = load_model(model, experiment.models[model], device)
        pool = EnginePool(experiment, {model: bundle}, chosen.adapter)
        try:
            engine = pool.engine(model)
            engine.adapter.model.eval()
            if base:
                engine.adapter.set_view(View.BASE)
                note(f"base {model}", paper.take(engine.adapter.model, bundle.processor, size))
            for client in (c for c in wanted if entries[c]["model"] == model):
                state = checkpoint.clients[client]
                served = served_model(chosen, state, entries[client]["tasks"]).model
                engine.adapter.load(laid_over(state, served.overlay))
                engine.adapter.set_view(served.view)
                note(f"client {client}", paper.take(engine.adapter.model, bundle.processor, size))
        finally:
            pool.close()
        del bundle
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _keep(run_dir / RESULTS, name, exam, results)
    return results


def _keep(path: Path, strategy: str, exam: str, results: dict[str, ExamResult]) -> None:
    known: dict[str, Any] = {}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    rows = known.setdefault(strategy, {}).setdefault(exam, {})
    for label, result in results.items():
        rows[label] = {
            "score": result.score,
            "num_questions": result.num_questions,
            "parts": dict(result.parts),
        }
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
