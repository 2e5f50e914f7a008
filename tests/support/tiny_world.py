"""A whole experiment on disk: three clients, two tiny random models, DRAKE files, one YAML."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import save_text_model

ANIMALS = ("cat", "dog", "bird", "fish")
YAML = """\
common_args: {{random_seed: 1}}
train_args: {{federated_optimizer: {algo}, comm_round: 2}}
data_args:
  data: {{source: drake, root: data, scenario: tiny}}
model_args:
  models:
    small: {{path: models/small}}
    large: {{path: models/large}}
adapter_args:
  adapter: {{rank: 2, alpha: 4, num_blocks: 2}}
optim_args:
  optim: {{num_steps: 2, batch_size: 2, learning_rate: 1e-3, pq_learning_rate: 1e-3}}
sketch_args:
  sketch: {{frequency: 1, columns: 8}}
eval_args:
  evaluation: {{batch_size: 4, max_new_tokens: 2, every: 0, compare: []}}
run_args:
  run: {{root: runs}}
"""


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _rows(count: int, shift: int) -> list[dict[str, object]]:
    return [
        {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": "which animal ? Choice list:[cat, dog, bird, fish]."},
                {"from": "gpt", "value": ANIMALS[(number + shift) % 4]},
            ],
        }
        for number in range(count)
    ]


def write_world(folder: Path, algo: str = "FedMosaic") -> Path:
    """Fills a folder and returns the YAML file; a run takes seconds on one core."""
    save_text_model(folder / "models/small", "llama", hidden=16, layers=2)
    save_text_model(folder / "models/large", "qwen2", hidden=32, layers=4)
    clients = []
    for client_id, model in enumerate(("small", "large", "small")):
        task = {"dataset": f"Pets{client_id}", "subset_id": 0, "type": "multi-choice"}
        clients.append({"client_id": client_id, "model_id": model, "datasets": [task]})
        for split, count in (("train", 8), ("test", 4)):
            path = folder / f"data/dataset/Pets{client_id}/{split}/dataset-0.json"
            _write(path, _rows(count, client_id))
    _write(folder / "data/scenarios/tiny.json", clients)
    config = folder / "tiny.yaml"
    config.write_text(YAML.format(algo=algo), encoding="utf-8")
    return config
