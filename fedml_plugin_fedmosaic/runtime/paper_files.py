"""Writes the configurations and scenarios of the paper's experiments from their table."""

from __future__ import annotations

import json
from pathlib import Path

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.runtime.estimate import RunEstimate, estimate_run
from fedml_plugin_fedmosaic.runtime.paper import (
    EXPERIMENTS,
    SIZES,
    PaperExperiment,
    scenario_json,
)
from fedml_plugin_fedmosaic.runtime.setup import build_strategy
from fedml_plugin_fedmosaic.strategies.base import relative_steps

METHODS = {
    "FedMosaic": "fedmosaic",
    "SFT": "local",
    "FedAvg (FedIT)": "fedavg",
    "FedDPA": "feddpa",
    "FedSim": "fedsim",
    "TAKFL": "takfl",
    "FedMKT": "fedmkt",
    "Ditto": "ditto",
    "PerAda": "perada",
    "FedDAT": "feddat",
    "FedDistill": "feddistill",
}
"""The paper's methods and their names here."""
_GIB = 2**30
_TEMPLATE = """\
common_args:
  training_type: simulation
  random_seed: 1

data_args:
  data:
    source: {source}
    root: ../../{root}
    scenario: scenarios/{scenario}.json
    split: dynamic         # tasks arrive one after the other; static: all together
    rounds_per_task: {rounds_per_task}
    stream: memory
    memory_size: 100000

model_args:
  models:
{models}

adapter_args:
  adapter:
    rank: {rank}
    alpha: {alpha}
    dropout: 0.05
    num_blocks: 4

train_args:
  federated_optimizer: FedMosaic
  client_num_in_total: {clients}
  client_num_per_round: {clients}
  comm_round: {rounds}

optim_args:
  optim:
    learning_rate: {learning_rate}
    pq_learning_rate: {pq_learning_rate}
    schedule: {schedule}
    num_steps: {steps}  # of plain training; every strategy trains its share of it
    batch_size: 1
    grad_accumulation: 4
    moments: keep

sketch_args:
  sketch:
    proxy: "{proxy}"
    frequency: 10
    row_fraction: 0.4
    noise: gaussian
    noise_std: 1.0e-4
    ema: 0.5

eval_args:
  evaluation:
    mode: generate
    batch_size: 4
    max_new_tokens: 512
    every: 5
    round_samples: 100
    others: true
    compare: []
    base: true

device_args:
  using_gpu: true

comm_args:
  backend: MPI

tracking_args:
  enable_tracking: false

run_args:
  run:
    root: runs
    save_every: 1

launcher_args:
  launcher:
    ranks: {gpus}
    gpus_per_node: {gpus}
    cpus_per_task: 8
"""


def gpus_of(experiment: PaperExperiment) -> int:
    """GPUs of the machine that a configuration asks for: at most 4, and no more than clients."""
    return min(4, len(experiment.models))


def config_text(experiment: PaperExperiment) -> str:
    """A complete configuration file with its header."""
    setting = experiment.setting
    models = "\n".join(
        f'    "{name}": {{path: "{name}", size: {SIZES[name]}, dtype: bfloat16}}'
        for name in experiment.used
    )
    body = _TEMPLATE.format(
        source=setting.source,
        root=setting.root,
        scenario=experiment.scenario,
        rounds_per_task=setting.rounds_per_task,
        models=models,
        rank=setting.rank,
        alpha=2 * setting.rank,
        clients=len(experiment.models),
        rounds=experiment.rounds,
        learning_rate=setting.learning_rate,
        pq_learning_rate=setting.pq_learning_rate,
        schedule=setting.schedule,
        steps=setting.steps,
        proxy=experiment.proxy,
        gpus=gpus_of(experiment),
    )
    return "\n".join([*_header(experiment), "", body])


def _header(experiment: PaperExperiment) -> list[str]:
    path = f"configs/{experiment.file}.yaml"
    setting = experiment.setting
    what = [f"Scenario {experiment.scenario}: {experiment.what}."]
    if experiment.assigned_here:
        what.append("The numbers of clients per model are the paper's, who has which is our own.")
    if experiment.note:
        what.append(experiment.note)
    launch = [f"fedmosaic submit --cf {path} --partition gpu"]
    if len(set(experiment.models)) > 1:
        launch += [
            f"fedmosaic align --cf {path} --data PUBLIC.json --out alignment",
            "  once before, then add --set adapter.alignment=alignment to the first command",
        ]
    before = [f"fedmosaic models fetch --cf {path}"]
    if setting.source == "folder":
        before.append(f"the data in the DRAKE layout in the folder {setting.root}/")
    else:
        before.append(f"fedmosaic data fetch --cf {path}")
    gpus = gpus_of(experiment)
    where = "one GPU" if gpus == 1 else f"{gpus} GPUs"
    parts = {
        "what": what,
        "where": [f"One machine with {where} of 80 GB."],
        "time": [f"fedmosaic run --estimate --cf {path}"],
        "launch": launch,
        "before": before,
    }
    lines = [
        f"# {setting.title} of FedMosaic (arXiv 2506.11024), with the published settings.",
        "# Written by 'fedmosaic config paper' from a table; edit a copy.",
        "#",
    ]
    for label, texts in parts.items():
        for number, text in enumerate(texts):
            lines.append(f"# {label if number == 0 else '':<8}{text}")
    return lines


def scenario_text(experiment: PaperExperiment) -> str:
    """A scenario file, one line per task."""
    clients = []
    for client in scenario_json(experiment):
        tasks = ",\n".join(f"  {json.dumps(task)}" for task in client["datasets"])
        head = json.dumps({key: client[key] for key in ("client_id", "model_id")})[:-1]
        clients.append(f' {head}, "datasets": [\n{tasks}\n ]}}')
    return "[\n" + ",\n".join(clients) + "\n]\n"


def paper_files() -> dict[str, str]:
    """Path below ``configs/`` -> text of every file of the paper's experiments."""
    files: dict[str, str] = {}
    for experiment in EXPERIMENTS:
        files[f"{experiment.file}.yaml"] = config_text(experiment)
        files[f"{experiment.folder}/scenarios/{experiment.scenario}.json"] = scenario_text(
            experiment
        )
    return files


def write_paper_files(folder: Path) -> list[Path]:
    """Writes all of them below a folder and returns their paths."""
    written = []
    for name, text in paper_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def steps_table() -> str:
    """Markdown: local steps per round of the paper's methods at the cost of 100 of SFT."""
    lines = ["| the paper's method | here | steps of 100 |", "|---|---|---|"]
    base = load_experiment(None)
    for method, name in METHODS.items():
        steps = max(1, round(100 * relative_steps(build_strategy(name, base))))
        lines.append(f"| {method} | `{name}` | {steps} |")
    return "\n".join(lines)


def document_text(text: str, configs: Path) -> str:
    """A page with its generated tables made anew.

    A table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Args:
        text: of the page.
        configs: the folder ``configs/``.
    """
    for name, table in (("steps", steps_table()), ("estimates", estimate_table(configs))):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        tail = rest.partition(end)[2]
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


def estimate_table(configs: Path) -> str:
    """Markdown: memory and time of every experiment, from widths alone.

    Args:
        configs: the folder ``configs/``.
    """
    lines = [
        "| configuration | clients | rounds | GPUs | GiB on the fullest GPU | sent per client and "
        "round, MB | round | training, GPU hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for experiment in EXPERIMENTS:
        found = estimate_run(load_experiment(configs / f"{experiment.file}.yaml"))
        lines.append(_estimate_row(experiment, found))
    return "\n".join(lines)


def _estimate_row(experiment: PaperExperiment, found: RunEstimate) -> str:
    rows, columns = found.sketch or (0, 0)
    sent = sorted(4 * (model.upload + rows * columns) / 1e6 for model in found.models.values())
    spread = f"{sent[0]:.0f}" if len(set(sent)) == 1 else f"{sent[0]:.0f} to {sent[-1]:.0f}"
    cells = (
        f"`{experiment.file}.yaml`",
        str(len(experiment.models)),
        str(found.rounds),
        str(found.topology.size),
        f"{found.peak / _GIB:.0f}",
        spread,
        f"{found.round_s:.0f} s",
        f"{found.gpu_hours:.1f}",
    )
    return f"| {' | '.join(cells)} |"
