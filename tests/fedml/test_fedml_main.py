"""FedML main programs, ours and FedML's own, with the plugin installed and no way out.

Every program runs with name look-ups and connections blocked and recorded, and with a home folder
of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import write_world

pytestmark = [pytest.mark.fedml, pytest.mark.timeout(600)]

# Loaded by Python itself at start-up, before any other code, from PYTHONPATH.
SITECUSTOMIZE = """
import atexit, json, os, socket, sys
calls = []
def refuse(*args, **kwargs):
    calls.append(repr(args[-2:]))
    raise OSError("the test blocks the network")
socket.getaddrinfo = socket.create_connection = refuse
class Socket(socket.socket):
    connect = connect_ex = sendto = refuse
socket.socket = Socket
sys.network_calls = calls
atexit.register(lambda: open(os.environ["CALLS"], "w").write(json.dumps(calls)))
"""

RUN_SIMULATION = """
import fedml

if __name__ == "__main__":
    fedml.run_simulation()
    print("plain standard output")
"""

RUNNERS = """
import json, logging, sys
import fedml
from fedml import FedMLRunner

results = {}
args = fedml.init()
device = fedml.device.get_device(args)
dataset, output_dim = fedml.data.load(args)
model = fedml.model.create(args, output_dim)
args.comm_round = 1
runner = FedMLRunner(args, device, dataset, model)
runner.run()
results["simulator"] = type(runner.runner).__name__
results["run_dir"] = str(runner.runner.fl_trainer.summary.run_dir)

import fedml_plugin_fedmosaic
flow = fedml_plugin_fedmosaic.Runner(args)
FedMLRunner(args, device, dataset, model, algorithm_flow=flow).run()
results["flow_dir"] = str(flow.summary.run_dir)

def failure(function):
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error), *getattr(error, "__notes__", ())]

args.federated_optimizer = "FedMosiac"
results["typo"] = failure(lambda: FedMLRunner(args, device, dataset, model))
args.federated_optimizer = "FedMosaic"
args.training_type = "cross_silo"
args.role, args.scenario = "server", "horizontal"
results["cross_silo"] = failure(lambda: FedMLRunner(args, device, dataset, model))
results["cross_silo_init"] = failure(lambda: fedml.init(args))
args.training_type, args.enable_fhe = "simulation", True
results["fhe"] = failure(lambda: fedml.init(args))
results["network"] = list(sys.network_calls)
json.dump(results, open("results.json", "w"))
"""

STOCK_FEDAVG = """
import hashlib, json, sys
if sys.argv.pop() == "stock":
    import _fedmosaic_hook
    _fedmosaic_hook.uninstall()
import torch
import fedml
from fedml import FedMLRunner

args = fedml.init()
device = fedml.device.get_device(args)
generator = torch.Generator().manual_seed(0)
def loader(count):
    rows = torch.randn(count, 784, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows, labels), batch_size=5)
train = {i: loader(20) for i in range(2)}
test = {i: loader(10) for i in range(2)}
dataset = [40, 20, loader(40), loader(20), {0: 20, 1: 20}, train, test, 10]
torch.manual_seed(0)
runner = FedMLRunner(args, device, dataset, torch.nn.Sequential(torch.nn.Linear(784, 10)))
runner.run()
state = runner.runner.fl_trainer.model_trainer.get_model_params()
digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest()
trainer = type(runner.runner.fl_trainer).__module__
results = {"digest": digest, "trainer": trainer, "network": len(sys.network_calls)}
json.dump(results, open("results.json", "w"))
"""

FEDAVG_YAML = """\
common_args: {training_type: simulation, random_seed: 0}
data_args: {dataset: mnist, data_cache_dir: data, partition_method: hetero, partition_alpha: 0.5}
model_args: {model: lr}
train_args:
  federated_optimizer: FedAvg
  client_id_list: "[]"
  client_num_in_total: 2
  client_num_per_round: 2
  comm_round: 2
  epochs: 1
  batch_size: 5
  client_optimizer: sgd
  learning_rate: 0.03
  weight_decay: 0.001
validation_args: {frequency_of_the_test: 1}
device_args: {using_gpu: false, gpu_id: 0}
comm_args: {backend: sp}
tracking_args: {enable_tracking: false, enable_wandb: false}
"""


class Program:
    """A main program that runs in a folder of its own."""

    def __init__(self, folder: Path, code: str, config: Path, *arguments: str) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        (folder / "block").mkdir()
        (folder / "block/sitecustomize.py").write_text(SITECUSTOMIZE)
        (folder / "main.py").write_text(code)
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / ".cache"),
            "CALLS": str(folder / "calls.json"),
            "PYTHONPATH": str(folder / "block"),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "main.py", "--cf", str(config), *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> Program:
        self.out, self.err = self.process.communicate(timeout=500)
        assert self.process.returncode == 0, self.err
        self.calls = json.loads((self.folder / "calls.json").read_text())
        return self

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    root = tmp_path_factory.mktemp("mains")
    config = write_world(root / "world")
    fedavg = root / "fedavg.yaml"
    fedavg.write_text(FEDAVG_YAML)
    made = {}
    # Two at a time: importing FedML takes seconds and a gigabyte.
    for pair in (
        {
            "simulation": (RUN_SIMULATION, config),
            "runners": (RUNNERS, config),
        },
        {
            "fedavg": (STOCK_FEDAVG, fedavg, "extended"),
            "fedavg-stock": (STOCK_FEDAVG, fedavg, "stock"),
        },
    ):
        started = {name: Program(root / name, *rest) for name, rest in pair.items()}
        made.update({name: program.finish() for name, program in started.items()})
    return made


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_run_simulation_runs_our_algorithm(programs):
    folder = programs["simulation"].folder
    (run_dir,) = (folder / "runs").iterdir()
    finished = [event for event in events(run_dir) if event["event"] == "RoundFinished"]
    assert [event["round_idx"] for event in finished] == [0, 1]
    assert (run_dir / "report.html").is_file()


def test_standard_output_stays_the_programs_own(programs):
    assert programs["simulation"].out == "plain standard output\n"
    assert "fedmosaic: round 2 took" in programs["simulation"].err


def test_a_run_of_ours_opens_no_connection(programs):
    assert programs["simulation"].calls == []
    assert programs["runners"].results["network"] == []


def test_we_write_nothing_into_the_home_folder(programs):
    # FedML itself writes .fedml and wandb's .config or .cache.
    home = programs["simulation"].home
    assert not [path for path in home.rglob("*") if "fedmosaic" in path.name.lower()]


def test_the_runner_class_takes_changed_arguments(programs):
    folder, results = programs["runners"].folder, programs["runners"].results
    assert results["simulator"] == "SimulatorSingleProcess"
    finished = [e for e in events(folder / results["run_dir"]) if e["event"] == "RoundFinished"]
    assert len(finished) == 1


def test_the_algorithm_flow_route_gives_the_same_numbers(programs):
    folder, results = programs["runners"].folder, programs["runners"].results
    assert results["flow_dir"] != results["run_dir"]
    losses = [
        [e["mean_loss"] for e in events(folder / results[key]) if e["event"] == "ClientTrained"]
        for key in ("run_dir", "flow_dir")
    ]
    assert losses[0]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        (
            "typo",
            "Exception",
            "'FedMosiac' is neither FedML's nor this plugin's (ditto",
        ),
        ("cross_silo", "IntegrationError", "'cross_silo' is not supported yet; use simulation"),
        ("cross_silo_init", "IntegrationError", "use simulation"),
        ("fhe", "ConfigError", "enable_fhe must be false"),
    ],
)
def test_what_cannot_work_is_refused(case, kind, text, programs):
    name, *texts = programs["runners"].results[case]
    assert name == kind
    assert text in " ".join(texts)


def test_fedmls_own_algorithm_is_bit_for_bit_as_without_us(programs):
    with_us, without = programs["fedavg"].results, programs["fedavg-stock"].results
    assert with_us["trainer"] == "fedml.simulation.sp.fedavg.fedavg_api"
    # FedML asks its servers for a configuration, with us as without us.
    assert with_us == without
    assert with_us["network"] > 0
