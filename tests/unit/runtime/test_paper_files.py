"""The configurations of the paper's experiments are what their table says, and complete."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.loader import bundled_config, load_experiment
from fedml_plugin_fedmosaic.data.scenario import bundled_scenarios, find_scenario, read_scenario
from fedml_plugin_fedmosaic.data.sources import bundled_tasks
from fedml_plugin_fedmosaic.engine.shapes import published_shape
from fedml_plugin_fedmosaic.runtime.paper import EXPERIMENTS
from fedml_plugin_fedmosaic.runtime.paper_files import document_text, paper_files, steps_table

CONFIGS = bundled_config().parent
# scenario -> clients, tasks of each, clients per model as published
PUBLISHED = {
    "AB_align": (2, 1, {"llama3.2_3B": 1, "llama3.2_1B": 1}),
    "DRAKE_homo_llava_llama_1B": (10, 4, {"llama3.2_1B": 10}),
    "DRAKE_homo_llava_llama_3B": (10, 4, {"llama3.2_3B": 10}),
    "DRAKE_homo_llava_llama_8B": (10, 4, {"llama3.1_8B": 10}),
    "DRAKE_homo_llava_qwen_0_5B": (10, 4, {"qwen2.5_0.5B": 10}),
    "DRAKE_homo_llava_qwen_1_5B": (10, 4, {"qwen2.5_1.5B": 10}),
    "DRAKE_homo_llava_qwen_3B": (10, 4, {"qwen2.5_3B": 10}),
    "DRAKE_hetero_llava_llama_1B_3B": (10, 4, {"llama3.2_1B": 4, "llama3.2_3B": 6}),
    "DRAKE_hetero_llava_llama_1B_3B_8B": (
        10, 4, {"llama3.2_1B": 3, "llama3.2_3B": 5, "llama3.1_8B": 2},
    ),
    "DRAKE_hetero_llava_llama_1B_3B_qwen_1_5B": (
        10, 4, {"llama3.2_1B": 2, "llama3.2_3B": 5, "qwen2.5_1.5B": 3},
    ),
    "DRAKE_hetero_llava_llama_3B_qwen_1_5B": (10, 4, {"llama3.2_3B": 6, "qwen2.5_1.5B": 4}),
    "DRAKE_hetero_llava_llama_3B_qwen_1_5B_3B": (
        10, 4, {"llama3.2_3B": 3, "qwen2.5_1.5B": 4, "qwen2.5_3B": 3},
    ),
    "DRAKE_hetero_llava_qwen_0_5B_1_5B_3B": (
        10, 4, {"qwen2.5_0.5B": 2, "qwen2.5_1.5B": 3, "qwen2.5_3B": 5},
    ),
    "DRAKE_unseen_newtasktype": (4, 1, {"llama3.2_3B": 4}),
    "DRAKE_unseen_newvisualdomain": (3, 1, {"llama3.2_3B": 3}),
    "HFLB_homo_llava_llama_1B": (9, 4, {"llama3.2_1B": 9}),
    "HFLB_homo_llava_llama_3B": (9, 4, {"llama3.2_3B": 9}),
    "HFLB_hetero_llava_llama_1B_3B": (9, 4, {"llama3.2_1B": 3, "llama3.2_3B": 6}),
    "Fed-Scope_hetero_llama_3B_8B": (5, 4, {"Llama-3.2-3B": 3, "Llama-3.1-8B": 2}),
    "Fed-aya_hetero_llama_1B_3B": (8, 4, {"Llama-3.2-1B": 4, "Llama-3.2-3B": 4}),
    "Fed-LLM_hetero_llama_1B_3B": (52, 2, {"Llama-3.2-1B": 26, "Llama-3.2-3B": 26}),
}  # fmt: skip


def test_the_files_are_those_of_the_table() -> None:
    hint = "run: fedmosaic config paper configs"
    for name, text in paper_files().items():
        assert (CONFIGS / name).read_text(encoding="utf-8") == text, f"{name}: {hint}"


def test_every_published_scenario_has_its_file() -> None:
    assert {experiment.scenario for experiment in EXPERIMENTS} == set(PUBLISHED)
    assert len({experiment.file for experiment in EXPERIMENTS}) == len(EXPERIMENTS) == 21
    for name, (num_clients, num_tasks, models) in PUBLISHED.items():
        clients = read_scenario(find_scenario(name))
        assert len(clients) == num_clients
        assert {len(client.tasks) for client in clients} == {num_tasks}
        found = collections.Counter(
            client.model_id.rpartition("/")[2].removesuffix("_vl") for client in clients
        )
        assert found == models, name


def test_clients_of_the_drake_mixes_have_the_same_tasks() -> None:
    paths = [path for name, path in bundled_scenarios().items() if name.startswith("DRAKE_h")]
    assert len(paths) == 12
    first, *others = ([client.tasks for client in read_scenario(path)] for path in paths)
    assert all(tasks == first for tasks in others)
    tasks = [task for client in first for task in client]
    assert len({task.name for task in tasks}) == 40
    open_ended = {task.name: task.metric for task in tasks if task.kind == "open-ended"}
    assert open_ended == {"iconqa-2": "F1", "iconqa-3": "F1"}


def test_published_assignments_of_models() -> None:
    def holders(scenario: str, model: str) -> list[int]:
        clients = read_scenario(find_scenario(scenario))
        return [client.client_id for client in clients if model in client.model_id]

    assert holders("DRAKE_hetero_llava_llama_1B_3B", "1B") == [0, 1, 8, 9]
    assert holders("HFLB_hetero_llava_llama_1B_3B", "1B") == [0, 1, 5]
    assert holders("Fed-LLM_hetero_llama_1B_3B", "1B") == list(range(0, 52, 2))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda item: item.file)
def test_a_configuration_has_the_published_settings(experiment) -> None:
    found = load_experiment(CONFIGS / f"{experiment.file}.yaml")
    is_text = experiment.folder == "text"
    optim, adapter, sketch = found.optim, found.adapter, found.sketch
    expected = {
        "drake": (2e-5, 5e-5, "constant", 100),
        "hflb": (2e-5, 5e-5, "constant", 100),
        "text/fed_scope": (3e-4, 5e-4, "cosine", 30),
        "text/fed_aya": (3e-4, 5e-4, "cosine", 50),
        "text/fed_llm": (1e-4, 5e-4, "cosine", 10),
    }[experiment.file if is_text else experiment.folder]
    rates = (optim.learning_rate, optim.pq_learning_rate)
    assert (*rates, optim.schedule, optim.num_steps) == expected
    assert (optim.batch_size, optim.grad_accumulation, optim.weight_decay) == (1, 4, 0.0)
    assert (adapter.rank, adapter.alpha) == ((16, 32) if is_text else (128, 256))
    assert (adapter.num_blocks, adapter.dropout, len(adapter.target_modules)) == (4, 0.05, 7)
    assert (sketch.frequency, sketch.row_fraction, sketch.noise_std) == (10, 0.4, 1e-4)
    assert found.train.comm_round == 5 * len(experiment.tasks[0])
    assert found.train.client_num_in_total == found.train.client_num_per_round
    assert set(found.models) == {*experiment.models, experiment.proxy}
    assert all(spec.dtype == "bfloat16" for spec in found.models.values())
    # Every model is one whose dimensions are known, so that it can be estimated anywhere.
    assert all(published_shape(spec.path) is not None for spec in found.models.values())
    families = {"qwen" in name for name in experiment.models}
    wanted = "qwen2.5_0.5B" if True in families else "1B"
    assert sketch.proxy is not None
    assert wanted in sketch.proxy


def test_steps_of_strategies_are_the_published_ones() -> None:
    rows = [[cell.strip(" `") for cell in line.split("|")[1:4]] for line in
            steps_table().splitlines()[2:]]  # fmt: skip
    assert {name: int(steps) for _, name, steps in rows if name != "feddistill"} == {
        "fedmosaic": 94, "local": 100, "fedavg": 100, "feddpa": 100, "fedsim": 75, "takfl": 75,
        "fedmkt": 60, "ditto": 50, "perada": 50, "feddat": 43,
    }  # fmt: skip


def test_the_tables_of_the_page_are_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    page = Path(__file__).parents[3] / "docs/reproduce.md"
    text = page.read_text(encoding="utf-8")
    hint = "run: python -m fedml_plugin_fedmosaic config paper --page docs/reproduce.md"
    assert document_text(text, CONFIGS) == text, hint


def test_tasks_of_a_whole_benchmark() -> None:
    # 40 of the clients' and 7 unseen ones.
    assert len(bundled_tasks("drake")) == 47
    assert len(bundled_tasks("hflb")) == 36
    assert bundled_tasks("nothing") == ()


def test_the_command_writes_them_anywhere(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["config", "paper", str(tmp_path)])
    assert result.exit_code == 0, result.output
    written = [Path(line) for line in result.stdout.splitlines()]
    assert len(written) == 42
    assert all(path.is_file() for path in written)
    scenario = json.loads((tmp_path / "hflb/scenarios/HFLB_homo_llava_llama_1B.json").read_text())
    assert scenario[8]["datasets"][3] == {
        "dataset": "AQUA", "subset_id": 103, "type": "multi-choice",
    }  # fmt: skip
    load_experiment(tmp_path / "hflb/llama_1B.yaml")
