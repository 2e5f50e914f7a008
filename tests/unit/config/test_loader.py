"""Loading: every mistake at once, with its line; options, paths and FedML's own keys."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import STRATEGIES

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes ``c.yaml`` into the current folder and gives its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("c.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
        return Path("c.yaml")

    return write


def problems(path: Path, *overrides: str, **options: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides, **options)
    return caught.value.message.splitlines()


def test_a_file_names_only_what_differs(write: Write) -> None:
    experiment = load_experiment(write("train_args:\n  comm_round: 3\n"))
    assert experiment.train.comm_round == 3
    assert experiment.optim == Experiment().optim
    assert experiment.algo == "fedmosaic"


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write("""\
        common_args:
          random_sed: 3
        train_args:
          federated_optimizer: FedMosaics
          comm_round: two
        tracking_args:
        adapter_args:
          adapter: {rank: -4, alpha: 2e1, dropout: true, gate: Scaler}
        model_args:
          models:
            a: {pth: x}
            b: 3
        sketcharg: {}
        """)
    assert problems(path) == [
        "c.yaml:2: common_args.random_sed: unknown key; did you mean 'random_seed'?",
        "c.yaml:4: train_args.federated_optimizer: unknown strategy 'FedMosaics'; "
        f"known: {', '.join(STRATEGIES)}; did you mean 'fedmosaic'?",
        'c.yaml:5: train_args.comm_round: must be a whole number (got "two")',
        "c.yaml:6: tracking_args: the section is empty; give it keys or remove it",
        "c.yaml:8: adapter_args.adapter.rank: must be >= 1 (got -4)",
        "c.yaml:8: adapter_args.adapter.dropout: must be a number (got true)",
        "c.yaml:8: adapter_args.adapter.gate: must be one of 'scalar' or 'input'; "
        "did you mean 'scalar'? (got \"Scaler\")",
        "c.yaml:11: model_args.models.a.path: is required",
        "c.yaml:11: model_args.models.a.pth: unknown key; did you mean 'path'?",
        "c.yaml:12: model_args.models.b: must be a mapping (got 3)",
        "c.yaml:13: sketcharg: unknown section; did you mean 'sketch_args'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_args: {comm_round: 1.0}", "must be a whole number (got 1.0)"),
        ("train_args: {comm_round: true}", "must be a whole number (got true)"),
        ("train_args: {comm_round: '3'}", 'must be a whole number (got "3")'),
        ("train_args: {comm_round: null}", "must be a whole number (got null)"),
        ("train_args: {comm_round: [3]}", "must be a whole number (got [3])"),
        ("device_args: {using_gpu: 1}", "must be true or false (got 1)"),
        ("optim_args: {optim: {learning_rate: 0}}", "must be > 0 (got 0)"),
        ("optim_args: {optim: {learning_rate: .inf}}", "must be a finite number"),
        ("adapter_args: {adapter: {dropout: 1}}", "must be < 1 (got 1)"),
        ("adapter_args: {adapter: {target_modules: q_proj}}", "must be a list"),
        ("adapter_args: {adapter: {target_modules: [1]}}", "[0]: must be text (got 1)"),
        ("run_args: {run: {name: 12}}", "must be text (got 12)"),
        ("comm_args: {backend: mpi}", "did you mean 'MPI'?"),
        ("comm_args: {backend: GRPC}", "must be one of 'sp' or 'MPI' (got \"GRPC\")"),
        ("strategy_args: {strategy: {temperture: 1}}", "did you mean 'temperature'?"),
        ("strategy_args: {strategy: {temperature: hot}}", "must be a number"),
        ("strategy_args: {strategy: 3}", "must be a mapping (got 3)"),
        ("data_args: {data: {source: drak}}", "unknown data set 'drak'"),
        ("adapter_args: {adapter: {type: pqlora}}", "did you mean 'pq_lora'?"),
        ("eval_args: {evaluation: {compare: [local, fedavgs]}}", "compare[1]: unknown strategy"),
        ("sketch_args: {sketch: {proxy: big}}", "no model 'big' in model_args.models"),
        ("model_args: {models: {a: {path: ''}}}", "models.a.path: must not be empty"),
        (
            "data_args: {data: {split: static, rounds_per_task: 1.5}}",
            "must be a whole number with split: static",
        ),
        (
            "train_args: {client_num_in_total: 3, client_num_per_round: 4}",
            "client_num_per_round: must be <= client_num_in_total (3) (got 4)",
        ),
    ],
)
def test_wrong_values(write: Write, text: str, message: str) -> None:
    (line,) = problems(write(text + "\n"))
    assert line.startswith("c.yaml:1: ")
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim_args: {learning_rate: 1}", "one level deeper, into optim_args.optim.learning_rate"),
        ("optim_args: {optm: {}}", "unknown key; did you mean 'optim'?"),
        ("optim_args: {comm_round: 1}", "there is train_args.comm_round"),
        ("common_args: {comm_round: 1}", "there is train_args.comm_round"),
        ("comm_round: 3", "is not a section; there is train_args.comm_round"),
        ("optim: {learning_rate: 1}", "did you mean 'optim_args.optim'?"),
        ("optim_args: {optim: }", "optim_args.optim: is empty"),
        ("optim_args: {}", "the section is empty"),
        ("optim_args: 3", "the section must be a mapping"),
        ("xyzzy_args: {a: 1}", "unknown section; known: common_args, train_args"),
    ],
)
def test_keys_in_the_wrong_place(write: Write, text: str, message: str) -> None:
    (line,) = problems(write(text + "\n"))
    assert line.startswith("c.yaml:1: ")
    assert message in line


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fhe_args: {enable_fhe: true}", "can never switch encryption on"),
        ("defense_args: {enable_defense: true, defense_type: krum}", "one shape"),
        ("attack_args: {enable_attack: true}", "one shape"),
        ("tracking_args: {enable_tracking: true}", "the internet"),
        ("tracking_args: {enable_wandb: true}", "the internet"),
        ("common_args: {using_mlops: true}", "the internet"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(write: Write, text: str, why: str) -> None:
    (line,) = problems(write(text + "\n"))
    assert "must be false: " in line
    assert why in line


def test_switches_that_are_off_are_fine(write: Write) -> None:
    load_experiment(
        write("""\
            common_args: {using_mlops: false}
            fhe_args: {enable_fhe: false, scheme: ckks}
            defense_args: {enable_defense: false, defense_type: krum}
            attack_args: {enable_attack: false}
            """)
    )
    (line,) = problems(write("fhe_args: {enable_fhe: maybe}\n"))
    assert 'must be true or false (got "maybe")' in line


def test_fedml_keys_are_ignored_and_those_with_a_counterpart_named(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("""\
        data_args: {dataset: mnist, data_cache_dir: x, partition_method: hetero}
        model_args: {model: lr}
        train_args: {epochs: 1, batch_size: 10, learning_rate: 0.03, comm_round: 2}
        validation_args: {frequency_of_the_test: 1}
        device_args: {worker_num: 2, gpu_mapping_key: k}
        comm_args: {backend: MPI, grpc_ipconfig_path: ip.csv}
        """)
    with caplog.at_level(logging.WARNING):
        experiment = load_experiment(path)
    assert experiment.comm.backend == "MPI"
    assert experiment.optim == Experiment().optim
    assert "c.yaml:3: train_args.learning_rate is FedML's" in caplog.text
    assert "optim_args.optim.learning_rate" in caplog.text
    assert "partition_method" not in caplog.text


def test_overrides_in_every_spelling(write: Write) -> None:
    path = write(
        "optim_args: {optim: {batch_size: 1}}\nvalidation_args: {frequency_of_the_test: 1}"
    )
    spellings = ("optim_args.optim.batch_size", "optim_args.batch_size", "optim.batch_size")
    for number, spelling in enumerate(spellings, start=7):
        assert load_experiment(path, [f"{spelling}={number}"]).optim.batch_size == number
    experiment = load_experiment(
        path,
        [
            "comm_round=5",
            "comm_round=6",
            "data_args.dataset=mnist",
            "validation_args.frequency_of_the_test=3",
            "learning_rate=2e-4",
            "models.a.path=org/name",
            "strategy.temperature=0.1",
            "evaluation.compare=[]",
            "train.client_num_per_round=null",
            "run.name='a=b'",
            "sketch={rows: first}",
        ],
    )
    assert experiment.train.comm_round == 6
    assert experiment.optim.learning_rate == 2e-4
    assert experiment.models["a"].path == "org/name"
    assert experiment.strategy == {"temperature": 0.1}
    assert experiment.evaluation.compare == ()
    assert experiment.run.name == "a=b"
    assert experiment.sketch.rows == "first"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rank=4", "optim_args.optim.rank: unknown key"),
        ("adapter.rank=0", "adapter_args.adapter.rank: must be >= 1 (got 0)"),
        ("comm_round=1.5", "train_args.comm_round: must be a whole number (got 1.5)"),
        ("comm_rond=1", "unknown key 'comm_rond'; did you mean 'comm_round'?"),
        ("x=1", "unknown key 'x'; write --set section.key=value"),
        ("batch_size=1", "exists in several sections"),
        ("optin.batch_size=1", "unknown section; did you mean 'optim'?"),
        ("train_args=1", "'train_args' is a section"),
        ("train..comm_round=1", "has an empty part"),
        ("foo", "there is no '='"),
        ("comm_round=[1", "is not a YAML value"),
        ("train_args.comm_round.x=1", "train_args.comm_round is not a mapping"),
    ],
)
def test_mistakes_in_overrides_name_the_option(write: Write, override: str, message: str) -> None:
    lines = problems(write("train_args: {comm_round: 2}\n"), override)
    assert len(lines) == 1
    assert lines[0].startswith(f"--set {override}: ")
    assert message in lines[0]


def test_mistakes_of_file_and_options_are_listed_together(write: Write) -> None:
    path = write("adapter_args: {adapter: {rank: 0}}\n")
    assert problems(path, "adapter.alpha=0", backend="tcp") == [
        "c.yaml:1: adapter_args.adapter.rank: must be >= 1 (got 0)",
        "--backend tcp: comm_args.backend: must be one of 'sp' or 'MPI' (got \"tcp\")",
        "--set adapter.alpha=0: adapter_args.adapter.alpha: must be > 0 (got 0)",
    ]
    (line,) = problems(write("train_args: {comm_round: 1}"), algo="fedprox")
    assert line.startswith("--algo fedprox: train_args.federated_optimizer: unknown strategy")


def test_algo_and_backend_replace_the_files(write: Write) -> None:
    path = write("strategy_args: {strategy: {temperature: 0.1}}\ncomm_args: {backend: MPI}\n")
    other = load_experiment(path, algo="local", backend="SP")
    assert (other.algo, other.comm.backend) == ("local", "sp")
    assert other.strategy == {}  # they were FedMosaic's
    same = load_experiment(path, algo="fedmosaic")
    assert same.strategy == {"temperature": 0.1}
    assert same.comm.backend == "MPI"


def test_relative_paths_start_at_the_file_and_those_of_options_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = tmp_path / "configs", tmp_path / "here"
    for path in (folder / "model", here / "other", folder / "other"):
        path.mkdir(parents=True)
    (folder / "c.yaml").write_text(
        textwrap.dedent("""\
            data_args: {data: {root: ../data, scenario: s/one.json}}
            model_args:
              models:
                a: {path: model}
                b: {path: "bundled:tiny"}
                c: {path: org/name}
                d: {path: /abs/olute}
            adapter_args: {adapter: {alignment: aligned}}
            """)
    )
    monkeypatch.chdir(here)
    experiment = load_experiment(Path("../configs/c.yaml"), ["models.e.path=other"])
    root = experiment.data.root
    assert root is not None
    assert Path(root).resolve() == tmp_path / "data"
    assert experiment.data.scenario == str(folder / "s/one.json")
    assert experiment.adapter.alignment == str(folder / "aligned")
    paths = {name: spec.path for name, spec in experiment.models.items()}
    assert paths == {
        "a": str(folder / "model"),
        "b": "bundled:tiny",
        "c": "org/name",
        "d": "/abs/olute",
        "e": str(here / "other"),
    }
    named = load_experiment(folder / "c.yaml", ["data.scenario=DRAKE", "adapter.alignment=bundled"])
    assert named.data.scenario == "DRAKE"
    assert named.adapter.alignment == "bundled"


def test_the_bundled_quickstart_is_the_default() -> None:
    experiment = load_experiment(None)
    assert experiment.algo == "fedmosaic"
    assert experiment.data.source == "quickstart"
    assert len(experiment.models) >= 2
