"""Fetching models and data into a cache, and runs that find what is missing there."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from fake_hub import FakeHub, serve_hub
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.loader import bundled_config
from fedml_plugin_fedmosaic.config.paths import hub_cache
from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.registry import DATASETS, SOURCES
from fedml_plugin_fedmosaic.data.base import TaskSpec
from fedml_plugin_fedmosaic.data.scenario import find_scenario, read_scenario
from fedml_plugin_fedmosaic.data.sources import bundled_tasks
from fedml_plugin_fedmosaic.engine.hub import missing_files, snapshot


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def cf(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny experiment with models of the hub, in a folder of its own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (world / "tiny.yaml").read_text(encoding="utf-8")
    text = text.replace("models/small", "tiny/small").replace("models/large", "tiny/large")
    path = tmp_path / "exp.yaml"
    path.write_text(text.replace("root: data,", f"root: {world / 'data'},"), encoding="utf-8")
    return path


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    root = tmp_path / "hub"
    for name in ("small", "large"):
        shutil.copytree(world / "models" / name, root / "models/tiny" / name)
    (root / "models/tiny/small/onnx").mkdir()
    (root / "models/tiny/small/onnx/model.json").write_text("{}")
    (root / "models/tiny/small/pytorch_model.bin").write_text("pickled")
    data = root / "datasets/some/data"
    data.mkdir(parents=True)
    for number in range(3):
        with tarfile.open(data / f"Pets{number}.tar", "w") as archive:
            archive.add(world / f"data/dataset/Pets{number}", arcname=f"Pets{number}")
    with serve_hub(root) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def test_fetched_models_run_offline(
    cf: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = invoke("run", "--cf", str(cf), "--dry-run")
    assert before.exit_code == 2
    assert sorted(before.stderr.splitlines()[1:3]) == [
        f"  model tiny/{name}: not in the cache {tmp_path / 'hf/hub'}"
        for name in ("large", "small")
    ]
    assert "fedmosaic models fetch" in before.stderr

    result = invoke("models", "fetch", "--cf", str(cf))
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in hub.downloads
    assert not {"pytorch_model.bin", "onnx/model.json"} & set(hub.downloads)
    folder = snapshot("tiny/small")
    assert folder is not None
    assert missing_files(folder) == []
    count = len(hub.downloads)
    assert invoke("models", "fetch", "tiny/small").exit_code == 0
    assert len(hub.downloads) == count

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ready = invoke("config", "check", "--cf", str(cf), "--offline-ready")
    assert ready.exit_code == 0, ready.output
    assert "a run needs no internet" in ready.stdout
    run = invoke("run", "--cf", str(cf), "--dry-run")
    assert run.exit_code == 0, run.output
    assert "model small" in run.stdout
    assert len(hub.downloads) == count


def test_what_is_torn_in_the_cache_is_named_before_anything_loads(cf: Path, hub: FakeHub) -> None:
    assert invoke("models", "fetch", "--cf", str(cf)).exit_code == 0
    folder = snapshot("tiny/large")
    assert folder is not None
    (folder / "model.safetensors").unlink()
    for arguments in (["run", "--dry-run"], ["config", "check", "--offline-ready"]):
        result = invoke(*arguments, "--cf", str(cf))
        assert result.exit_code == 2
        assert f"model tiny/large: model.safetensors missing in {folder}" in result.stderr


def test_a_sweep_file_means_the_models_of_all_its_runs(
    cf: Path, hub: FakeHub, tmp_path: Path
) -> None:
    models = {name: {"path": f"tiny/{name}"} for name in ("small", "large")}
    mixes = {name: {"model_args.models": {name: models[name]}} for name in models}
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(json.dumps({"cf": "exp.yaml", "grid": {"mix": mixes}}))
    result = invoke("models", "fetch", str(sweep))
    assert result.exit_code == 0, result.output
    assert snapshot("tiny/small") is not None
    assert snapshot("tiny/large") is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/none", "check the spelling"),
        ("nothing", "write owner/name"),
        ("tiny/bad name", "OWNER/NAME"),
    ],
)
def test_a_model_that_cannot_be_fetched(cf: Path, hub: FakeHub, name: str, message: str) -> None:
    result = invoke("models", "fetch", name)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_repository_without_safetensors_is_of_no_use(cf: Path, hub: FakeHub) -> None:
    (hub.root / "models/tiny/small/model.safetensors").unlink()
    result = invoke("models", "fetch", "tiny/small")
    assert result.exit_code == 2
    assert "its repository lacks model.safetensors" in result.stderr


def test_without_internet_fetch_says_where_to_run_it(
    cf: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = invoke("models", "fetch", "tiny/small")
    assert result.exit_code == 2
    assert "HF_HUB_OFFLINE is not set" in result.stderr


def test_data_are_fetched_once_and_checked(
    cf: Path, hub: FakeHub, world: Path, tmp_path: Path
) -> None:
    root = tmp_path / "shared"
    scenario = tmp_path / "scenario.json"
    shutil.copy(world / "data/scenarios/tiny.json", scenario)
    changes = ["--set", f"data.root={root}", "--set", f"data.scenario={scenario}"]
    before = invoke("config", "check", "--cf", str(cf), "--offline-ready", *changes)
    assert before.exit_code == 2
    assert f"data root '{root}'" in before.stderr

    fetch = ["data", "fetch", "--cf", str(cf), "--repo", "some/data", *changes]
    result = invoke(*fetch)
    assert result.exit_code == 0, result.output
    assert hub.downloads == ["Pets0.tar", "Pets1.tar", "Pets2.tar"]
    assert not list(root.rglob("*.tar"))
    again = invoke(*fetch)
    assert again.stdout.count("there already") == 3
    assert len(hub.downloads) == 3
    # What is incomplete is fetched again.
    (root / "dataset/Pets1/test/dataset-0.json").unlink()
    lacking = invoke("config", "check", "--cf", str(cf), "--offline-ready", *changes)
    assert "task Pets1-0: no file" in lacking.stderr
    assert invoke(*fetch).exit_code == 0
    assert hub.downloads[3:] == ["Pets1.tar"]


def data_options(tmp_path: Path, world: Path) -> list[str]:
    scenario = tmp_path / "scenario.json"
    shutil.copy(world / "data/scenarios/tiny.json", scenario)
    root = tmp_path / "shared"
    return [
        "--repo",
        "some/data",
        "--set",
        f"data.root={root}",
        "--set",
        f"data.scenario={scenario}",
    ]


def test_a_download_that_was_cut_goes_on_where_it_was(
    cf: Path, hub: FakeHub, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What has not filled a piece is lost; archives are larger than this one.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    fetch = ["data", "fetch", "--cf", str(cf), *data_options(tmp_path, world)]
    hub.cut = {"Pets1.tar": 3000}
    result = invoke(*fetch)
    for _ in range(3):
        if result.exit_code == 0:
            break
        assert "run the same command again: it goes on where it was" in result.stderr
        result = invoke(*fetch)
    assert result.exit_code == 0, result.output
    starts = [first for name, first in hub.starts if name == "Pets1.tar"]
    assert starts[0] == 0
    assert starts[-1] == 3000
    assert (tmp_path / "shared/dataset/Pets1/train/dataset-0.json").is_file()


def test_an_archive_with_another_checksum_is_not_unpacked(
    cf: Path, hub: FakeHub, world: Path, tmp_path: Path
) -> None:
    fetch = ["data", "fetch", "--cf", str(cf), *data_options(tmp_path, world)]
    hub.torn = {"Pets1.tar"}
    result = invoke(*fetch)
    assert result.exit_code == 2
    assert "Pets1.tar of data set some/data: its checksum is not the published one" in result.stderr
    assert not (tmp_path / "shared/dataset/Pets1").exists()
    assert not list((tmp_path / "shared").rglob("Pets1.tar"))
    hub.torn = set()
    assert invoke(*fetch).exit_code == 0


def test_weights_with_another_checksum_are_fetched_again(cf: Path, hub: FakeHub) -> None:
    hub.torn = {"model.safetensors"}
    result = invoke("models", "fetch", "tiny/small")
    assert result.exit_code == 2
    assert "model.safetensors of model tiny/small: its checksum" in result.stderr
    hub.torn = set()
    assert invoke("models", "fetch", "tiny/small").exit_code == 0
    assert hub.downloads.count("model.safetensors") == 2


def publish(hub: FakeHub, repository: str, tasks: Iterable[TaskSpec]) -> None:
    """Puts archives of tasks on the hub, with one sample per file."""
    tasks = list(tasks)
    folder = hub.root / "datasets" / repository
    for name in dict.fromkeys(task.dataset for task in tasks):
        for task in (task for task in tasks if task.dataset == name):
            for split in ("train", "test"):
                path = folder / "unpacked" / name / split / f"dataset-{task.subset_id}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                turns = [{"value": "which ?"}, {"value": "this"}]
                path.write_text(json.dumps([{"conversations": turns}]))
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            archive.add(folder / "unpacked" / name, arcname=name)
    shutil.rmtree(folder / "unpacked")


@pytest.mark.parametrize(
    ("name", "repository", "scenario"),
    [
        ("drake", "SNUMPR/DRAKE", "DRAKE_hetero_llava_llama_1B_3B"),
        ("hflb", "SNUMPR/HFLB", "HFLB_homo_llava_llama_1B"),
    ],
)
def test_a_published_benchmark_is_fetched_by_its_name(
    cf: Path, hub: FakeHub, tmp_path: Path, name: str, repository: str, scenario: str
) -> None:
    publish(hub, repository, bundled_tasks(name))
    known = {task.dataset for task in bundled_tasks(name)}
    one = sorted(known)[0]
    result = invoke("data", "fetch", name, "--dataset", one)
    assert result.exit_code == 0, result.output
    assert hub.downloads == [f"{one}.tar"]
    assert invoke("data", "fetch", name).exit_code == 0
    assert len(hub.downloads) == len(known)
    assert {path.name for path in (tmp_path / name / "dataset").iterdir()} == known
    config = DataConfig(source=name, root=str(tmp_path / name), scenario=scenario)
    assert SOURCES[name]().missing(config) == []
    found = DATASETS[name](config)
    assert len(found.clients) == len(read_scenario(find_scenario(scenario)))
    # The configuration's own command finds all of it there.
    settings = ["--set", f"data.root={tmp_path / name}"]
    file = bundled_config().parent / name / "llama_1B_3B.yaml"
    again = invoke("data", "fetch", "--cf", str(file), *settings)
    assert again.exit_code == 0, again.output
    assert len(hub.downloads) == len(known)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drake-lite"], "'drake-lite' is no published benchmark and no YAML file"),
        (["drake", "--dataset", "GQA"], "drake has no data set 'GQA'; it has Fashion200K"),
        (["--root", "x"], "--dataset and --root need the NAME of a benchmark"),
    ],
)
def test_wrong_names_of_benchmarks(cf: Path, hub: FakeHub, words: list[str], message: str) -> None:
    result = invoke("data", "fetch", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert hub.downloads == []


def test_data_that_are_not_published_are_asked_for(cf: Path, hub: FakeHub, tmp_path: Path) -> None:
    file = bundled_config().parent / "text/fed_aya.yaml"
    result = invoke("data", "fetch", "--cf", str(file), "--set", f"data.root={tmp_path / 'aya'}")
    assert result.exit_code == 2
    assert (
        "data set 'Fed-aya_topic' is not there, and no repository of it is known" in result.stderr
    )
    assert "dataset/Fed-aya_topic/train/dataset-0.json" in result.stderr


def test_a_missing_archive_is_named(cf: Path, hub: FakeHub, world: Path, tmp_path: Path) -> None:
    (hub.root / "datasets/some/data/Pets2.tar").unlink()
    scenario = tmp_path / "scenario.json"
    shutil.copy(world / "data/scenarios/tiny.json", scenario)
    changes = ["--set", f"data.root={tmp_path / 'd'}", "--set", f"data.scenario={scenario}"]
    result = invoke("data", "fetch", "--cf", str(cf), "--repo", "some/data", *changes)
    assert result.exit_code == 2
    assert "Pets2.tar of data set some/data cannot be fetched" in result.stderr


def test_where_the_hubs_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "FEDMOSAIC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache() == tmp_path / ".cache/huggingface/hub"
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "own"))
    assert hub_cache() == tmp_path / "own/huggingface/hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert hub_cache() == tmp_path / "hf/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "exact"))
    assert hub_cache() == tmp_path / "exact"
