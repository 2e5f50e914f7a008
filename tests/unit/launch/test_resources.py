"""What jobs ask for, from the configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment, ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.launch.jobs import job_spec, new_run_dir, rank_of_line
from fedml_plugin_fedmosaic.launch.resources import (
    default_resources,
    het_components,
    parameters_of,
)

CONFIGS = Path(__file__).parents[3] / "configs"
LARGE = "drake/large_cross_family.yaml"


def load(name: str = LARGE, *settings: str, backend: str | None = None) -> Experiment:
    texts = [f"launcher_args.launcher.{setting}" for setting in settings]
    return load_experiment(CONFIGS / name, texts, backend=backend)


@pytest.mark.parametrize(
    ("path", "size", "billions"),
    [
        ("x/llama3.2_1B_vl", None, 1),
        ("x/qwen2.5_1.5B_vl", None, 1.5),
        ("meta-llama/Llama-3.1-8B-Instruct", None, 8),
        ("models/mine", "350M", 0.35),
        ("models/mine", None, 8),
        ("bundled:llama-small", None, 0.1),
    ],
)
def test_sizes(path, size, billions):
    assert parameters_of("name", ModelSpec(path=path, size=size)) == pytest.approx(billions * 1e9)


def test_one_group_per_model_on_whole_machines():
    found = default_resources(load())
    # 4 + 2 + 2 + 1 + 1 ranks on machines with 4 GPUs each
    assert (found.nodes, found.ntasks, found.ntasks_per_node, found.gpus_per_node) == (3, 12, 4, 4)
    # four ranks of the 8B model in bfloat16, each with the 1B proxy model
    weights = (8e9 + 1e9) * 2 / 2**30
    assert found.mem_gib == pytest.approx(4 * (2.5 + 1.25 * weights), abs=1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("nodes=5",), (5, 2, 10)),
        (("gpus_per_node=2",), (5, 2, 10)),
        (("nodes=2", "gpus_per_node=8"), (2, 5, 10)),
        (("ranks=16", "gpus_per_node=8"), (2, 8, 16)),
    ],
)
def test_what_is_given_stands(settings, expected):
    found = default_resources(load(LARGE, *settings))
    assert (found.nodes, found.ntasks_per_node, found.ntasks) == expected
    assert found.gpus_per_node == found.ntasks_per_node


@pytest.mark.parametrize("setting", ["nodes=2", "nodes=1"])
def test_machines_that_do_not_hold_the_ranks(setting):
    with pytest.raises(ConfigError, match="need 10 ranks with a GPU each"):
        default_resources(load(LARGE, setting, "gpus_per_node=4"))
    with pytest.raises(ConfigError, match="gpus_per_node is 0"):
        default_resources(load(LARGE, "gpus_per_node=0"))


def test_one_process_needs_one_task():
    found = default_resources(load("quickstart.yaml"))
    assert (found.nodes, found.num_tasks, found.gpus_per_node) == (1, 1, None)
    assert default_resources(load("quickstart.yaml", backend="MPI")).num_tasks == 4


def test_components_follow_the_order_of_the_groups():
    parts = het_components(load(LARGE, "heterogeneous=true"))
    assert [part.resources.num_tasks for part in parts] == [4, 2, 1]
    assert [part.resources.gpus_per_node for part in parts] == [4, 2, 1]
    assert "8B" in parts[0].name
    assert "qwen2.5_1.5B" in parts[2].name
    memory = [part.resources.mem_gib for part in parts]
    assert memory == sorted(memory, reverse=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("drake/small.yaml", ("heterogeneous=true",)),
        ("quickstart.yaml", ("heterogeneous=true",)),
        (LARGE, ("heterogeneous=true", "ranks=16")),
    ],
)
def test_no_components_without_need(name, settings):
    with pytest.raises(ConfigError):
        het_components(load(name, *settings))


def test_a_job_from_a_configuration(tmp_path):
    settings = ("python=apptainer exec --nv x.sif python3", "chain=3", "mpi=pmi2")
    spec = job_spec(load(LARGE, *settings), tmp_path / "a")
    assert spec.command[:6] == ("apptainer", "exec", "--nv", "x.sif", "python3", "-m")
    assert spec.command[-2:] == ("--run-dir", str(tmp_path / "a"))
    assert spec.resume_command[-2:] == ("--resume", str(tmp_path / "a"))
    assert (spec.name, spec.mpi, spec.chain, spec.requeue) == ("a", "pmi2", 3, False)
    assert job_spec(load("quickstart.yaml"), tmp_path).mpi == "none"


def test_run_folders_are_taken_once(tmp_path):
    experiment = load_experiment(CONFIGS / "quickstart.yaml", [f"run.root={tmp_path}"])
    names = [new_run_dir(experiment).name for _ in range(2)]
    assert names == ["fedmosaic-quickstart-001", "fedmosaic-quickstart-002"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("3: round 1", (3, "round 1")),
        (" 3: x", (3, "x")),
        ("[1,2]<stdout>: x", (2, "x")),
        ("12:30:01 start", (None, "12:30:01 start")),
        ("plain", (None, "plain")),
    ],
)
def test_labels_of_ranks(line, expected):
    assert rank_of_line(line) == expected
