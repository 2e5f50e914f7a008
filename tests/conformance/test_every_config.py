"""Every configuration that comes with the package is prepared as a run prepares it.

Models have the architecture of the configured ones with random weights, scaled down; every task of
the scenario has a few made-up samples. All else is the file's own, and the code is that of
``fedmosaic run --dry-run``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_image, save_llava, save_text_model

from fedml_plugin_fedmosaic.config.loader import bundled_config, load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.config.yamlfile import read_document
from fedml_plugin_fedmosaic.core.registry import SOURCES
from fedml_plugin_fedmosaic.data.scenario import ScenarioClient, find_scenario, read_scenario
from fedml_plugin_fedmosaic.launch.resources import default_resources
from fedml_plugin_fedmosaic.runtime.estimate import ScenarioSource, estimate_run
from fedml_plugin_fedmosaic.runtime.federation import PreparedRun, prepare_run
from fedml_plugin_fedmosaic.runtime.paper import EXPERIMENTS

CONFIGS = bundled_config().parent
FILES = sorted(CONFIGS.rglob("*.yaml"))
RUNS = [path for path in FILES if "model_args" in read_document(path).data]
PAPER = {f"{experiment.file}.yaml" for experiment in EXPERIMENTS}
# Decoder layers by size: as many ranks apart as the real ones, and at least one per block.
LAYERS = {"0.5B": 4, "1B": 5, "1.5B": 6, "3B": 7, "8B": 8}


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models: of two families, of five sizes, with and without a vision tower."""
    folder = tmp_path_factory.mktemp("zoo")
    for family in ("llama", "qwen2"):
        for size, layers in LAYERS.items():
            save_text_model(folder / f"text-{family}-{size}", family, hidden=16, layers=layers)
            save_llava(folder / f"image-{family}-{size}", family, hidden=16, layers=layers)
    return folder


def scaled_model(name: str, spec: Any, zoo: Path) -> Any:
    """The same kind of model, small; other families than these stand as the nearest of them."""
    family = "qwen2" if "qwen" in f"{name} {spec.path}".lower() else "llama"
    small = ("bundled:", "cached:")
    kind = "image" if spec.path.endswith("_vl") or spec.path.startswith(small) else "text"
    size = spec.size if spec.size in LAYERS else "1B"
    layers = None if spec.layers is None else 4
    path = zoo / f"{kind}-{family}-{size}"
    return replace(spec, path=str(path), layers=layers)


def scenario_of(experiment: Experiment) -> tuple[tuple[ScenarioClient, ...], str]:
    source = SOURCES[experiment.data.source]()
    if isinstance(source, ScenarioSource):
        return source.clients(experiment.data), str(experiment.data.scenario)
    path = find_scenario(experiment.data.scenario)
    return read_scenario(path), str(path)


def write_data(root: Path, experiment: Experiment, clients: tuple[ScenarioClient, ...]) -> str:
    """Samples for every task, and the scenario; returns the scenario's path."""
    has_images = any(
        Path(spec.path).name.startswith("image") for spec in experiment.models.values()
    )
    save_image(root / "picture.png", "red")
    entries = []
    for client in clients:
        tasks = [
            {"dataset": t.dataset, "subset_id": t.subset_id, "type": t.kind,
             **({"metric": t.metric} if t.metric else {})}
            for t in client.tasks
        ]  # fmt: skip
        model = client.model_id
        entries.append({"client_id": client.client_id, "model_id": model, "datasets": tasks})
        for task in client.tasks:
            row = {
                "image": ["picture.png"] if has_images else [],
                "conversations": [
                    {"value": ("<image>" if has_images else "") + "which ? Choice list:[cat, dog]"},
                    {"value": "cat"},
                ],
            }
            for split, count in (("train", 8), ("test", 2)):
                path = root / f"dataset/{task.dataset}/{split}/dataset-{task.subset_id}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps([row] * count))
    scenario = root / "scenario.json"
    scenario.write_text(json.dumps(entries))
    return str(scenario)


def scaled(path: Path, zoo: Path, root: Path) -> Experiment:
    """A configuration on tiny models and made-up data; its other values are the file's."""
    experiment = load_experiment(path)
    clients, _ = scenario_of(experiment)
    models = {name: scaled_model(name, spec, zoo) for name, spec in experiment.models.items()}
    scenario = write_data(root, replace(experiment, models=models), clients)
    return replace(
        experiment,
        models=models,
        data=replace(experiment.data, source="folder", root=str(root), scenario=scenario),
        adapter=replace(experiment.adapter, rank=4, alpha=8, alignment=None),
        device=replace(experiment.device, using_gpu=False),
    )


def prepared_run(path: Path, zoo: Path, root: Path) -> PreparedRun:
    experiment = scaled(path, zoo, root)
    on_gpu = replace(experiment, device=replace(experiment.device, using_gpu=True))
    ranks = default_resources(on_gpu).num_tasks
    return prepare_run(experiment, root / "run", ranks=None if ranks == 1 else ranks)


def test_no_configuration_escapes() -> None:
    others = [path for path in FILES if path not in RUNS]
    # What is not a run says which runs it means.
    assert all({"grid", "configs"} & read_document(path).data.keys() for path in others)
    assert {name_of(path) for path in RUNS} >= PAPER
    assert len(PAPER) == 21
    assert len(RUNS) >= len(PAPER) + 3
    scenarios = {path.stem for path in CONFIGS.rglob("scenarios/*.json")}
    assert {experiment.scenario for experiment in EXPERIMENTS} <= scenarios


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_configuration_is_prepared(path: Path, zoo: Path, tmp_path: Path) -> None:
    found = prepared_run(path, zoo, tmp_path)
    experiment = load_experiment(path)
    lines = dict(found.describe())
    assert lines["rounds"].startswith(str(experiment.train.comm_round))
    assert len(found.data.clients) == experiment.train.client_num_in_total
    assert {client.model_id for client in found.data.clients} <= set(experiment.models)
    assert all(len(samples) == 8 for client in found.data.clients for samples in client.train)
    assert found.proxy == (experiment.sketch.proxy or found.proxy)
    assert all(f"client {client.client_id}" in lines for client in found.data.clients)
    # Depths of the scaled models keep their order, so blocks and architectures are told apart.
    signatures = {info.signature for info in found.outlines.values()}
    used = [found.experiment.models[name] for name in found.outlines]
    assert len(signatures) == len({(spec.path, spec.layers) for spec in used})
    clients = [(client.client_id, client.model_id) for client in found.data.clients]
    estimate = estimate_run(found.experiment, clients, ranks=found.topology.size)
    assert estimate.round_s > 0
    assert set(estimate.models) == {model for _, model in clients}


def test_the_main_experiment_trains_and_answers(zoo: Path, tmp_path: Path) -> None:
    """One round of the paper's main mix, from the file to the scores."""
    torch.manual_seed(0)
    experiment = scaled(CONFIGS / "drake/llama_1B_3B.yaml", zoo, tmp_path)
    short = replace(
        experiment,
        train=replace(experiment.train, comm_round=1),
        optim=replace(experiment.optim, num_steps=1, batch_size=4, grad_accumulation=1),
        evaluation=replace(
            experiment.evaluation, max_new_tokens=1, others=False, base=False, batch_size=8
        ),
        data=replace(experiment.data, rounds_per_task=0.25),
        comm=replace(experiment.comm, backend="sp"),
    )
    summary = prepare_run(short, tmp_path / "out").execute()
    events = [
        json.loads(line) for line in (summary.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    scores = [event for event in events if event["event"] == "Evaluated"]
    assert {event["client_id"] for event in scores} == set(range(10))
    assert {event["metric"] for event in scores} == {"accuracy", "F1"}
