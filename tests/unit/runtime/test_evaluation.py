"""How many test samples a run asks, of whom and when."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.runtime.federation import prepare_run


def test_own_foreign_and_intermediate_evaluations_have_limits_of_their_own(tmp_path: Path) -> None:
    config = write_world(tmp_path, algo="FedAvg")
    settings = (
        "train.comm_round=2",
        "optim.num_steps=1",
        "data.stream=balanced",
        "evaluation.every=1",
        "evaluation.round_samples=1",
        "evaluation.others_samples=2",
        "evaluation.compare=[]",
    )
    prepare_run(load_experiment(config, list(settings)), tmp_path / "run").execute()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scored = [event for line in lines if (event := json.loads(line))["event"] == "Evaluated"]
    asked = {
        (event["strategy"], event["final"], event["scope"]): event["num_samples"]
        for event in scored
    }
    whole = asked["base", True, "self"]
    assert whole > 2
    assert asked == {
        ("base", True, "self"): whole,
        ("base", True, "others"): whole,
        ("fedavg", False, "self"): 1,
        ("fedavg", True, "self"): whole,
        ("fedavg", True, "others"): 2,
    }
