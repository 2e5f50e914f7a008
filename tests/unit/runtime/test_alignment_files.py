"""Alignment files: made once, found again, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_model import save_letter_model
from tiny_models import save_text_model, text_samples
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import AdapterConfig, Experiment, ModelSpec
from fedml_plugin_fedmosaic.core.errors import AdapterError, ConfigError, DataError
from fedml_plugin_fedmosaic.core.registry import ADAPTERS
from fedml_plugin_fedmosaic.core.types import Branch, Part
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.outline import outline_model
from fedml_plugin_fedmosaic.runtime import aligner as aligner_module
from fedml_plugin_fedmosaic.runtime.aligner import ModelAligner, PublicData, public_data
from fedml_plugin_fedmosaic.runtime.alignment import (
    check_alignments,
    load_alignment,
    wants_alignment,
)
from fedml_plugin_fedmosaic.runtime.alignment_files import (
    manifest_path,
    read_manifest,
    read_tensors,
    tensors_path,
)
from fedml_plugin_fedmosaic.runtime.alignment_fit import PairAligner
from fedml_plugin_fedmosaic.runtime.alignment_options import AlignOptions
from fedml_plugin_fedmosaic.runtime.client import EnginePool
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.offline import missing_offline

OPTIONS = AlignOptions(learning_rate=1e-2, positions="all")
DATA = PublicData(samples=text_samples(16), source=("tests",))
ADAPTER = AdapterConfig(rank=2, num_blocks=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    root = tmp_path_factory.mktemp("models")
    folders = {
        "org/big": save_letter_model(root / "b", hidden=32, layers=4),
        "small": save_text_model(root / "s", hidden=16, layers=2),
        "middle": save_text_model(root / "m", hidden=16, layers=3, seed=1),
    }
    return {name: ModelSpec(path=str(folder)) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were really aligned; the cache is the test's own."""
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    names: list[str] = []
    run = PairAligner.run

    def counted(self: PairAligner, samples: Any) -> Any:
        names.append(self._names[1])
        return run(self, samples)

    monkeypatch.setattr(PairAligner, "run", counted)
    return names


def aligner(models: dict[str, ModelSpec], out: Path, **changes: Any) -> ModelAligner:
    options = {"anchor": None, "options": OPTIONS, **changes}
    data = options.pop("data", DATA)
    experiment = Experiment(models=models, adapter=options.pop("adapter", ADAPTER))
    return ModelAligner(experiment, data, out, **options)


def test_a_call_makes_one_pair_of_files_per_model(models, tmp_path, made) -> None:
    found = aligner(models, tmp_path / "out").run()
    assert list(found) == ["small", "middle", "org/big"]  # by size
    assert made == ["middle", "org/big"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "middle.json",
        "middle.safetensors",
        "org--big.json",
        "org--big.safetensors",
        "small.json",
        "small.safetensors",
    ]
    manifest = read_manifest(tmp_path / "out", "org/big")
    assert manifest == found["org/big"]
    assert (manifest.rank, manifest.num_blocks, manifest.anchor.name) == (2, 2, "small")
    assert manifest.data == {
        "source": ["tests"],
        "num_samples": 16,
        "digest": found["middle"].data["digest"],
    }
    assert manifest.options["learning_rate"] == 1e-2
    assert manifest.quality.pairing == "tokens"
    assert found["middle"].quality.pairing == "direct"
    assert found["small"].is_anchor
    assert str(tmp_path) not in manifest_path(tmp_path / "out", "org/big").read_text()


def test_nothing_is_made_twice(models, tmp_path, made) -> None:
    first = aligner(models, tmp_path / "out").run()
    again = []
    aligner(models, tmp_path / "out").run(done=lambda m, known: again.append(known))
    assert again == [True] * 3
    # Another folder is filled from the cache.
    copied = aligner(models, tmp_path / "other").run()
    assert made == ["middle", "org/big"]
    for name, manifest in first.items():
        assert copied[name] == manifest
        ours, theirs = (
            read_tensors(tensors_path(tmp_path / where, name)) for where in ("out", "other")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    aligner(models, tmp_path / "out").run(force=True)
    assert made == ["middle", "org/big"] * 2


def test_an_interrupted_call_goes_on_where_it_was(models, tmp_path, made, monkeypatch) -> None:
    run = PairAligner.run

    def failing(self: PairAligner, samples: Any) -> Any:
        if self._names[1] == "org/big":
            raise KeyboardInterrupt
        return run(self, samples)

    monkeypatch.setattr(PairAligner, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        aligner(models, tmp_path / "out").run()
    monkeypatch.setattr(PairAligner, "run", run)
    assert made == ["middle"]
    aligner(models, tmp_path / "out").run()
    assert made == ["middle", "org/big"]
    assert not list((tmp_path / "out").glob(".align*"))


@pytest.mark.parametrize(
    "change",
    [
        {"options": replace(OPTIONS, seed=1)},
        {"options": replace(OPTIONS, learning_rate=2e-2)},
        {"adapter": replace(ADAPTER, rank=3)},
        {"adapter": replace(ADAPTER, target_modules=("q_proj", "v_proj"))},
        {"data": PublicData(samples=text_samples(17), source=("tests",))},
        {"anchor": "middle"},
    ],
    ids=["seed", "rate", "rank", "modules", "data", "anchor"],
)
def test_every_input_is_part_of_the_key(models, tmp_path, change) -> None:
    assert aligner(models, tmp_path).key("org/big") != aligner(models, tmp_path, **change).key(
        "org/big"
    )


def test_other_weights_are_another_key(models, tmp_path) -> None:
    other = save_text_model(tmp_path / "m", hidden=16, layers=3, seed=9)
    changed = {**models, "middle": ModelSpec(path=str(other))}
    assert aligner(models, tmp_path).key("middle") != aligner(changed, tmp_path).key("middle")
    assert aligner(models, tmp_path).key("small") == aligner(changed, tmp_path).key("small")


def test_damaged_files_are_made_again(models, tmp_path, made) -> None:
    pair = {name: models[name] for name in ("small", "middle")}
    aligner(pair, tmp_path / "out").run()
    path = tensors_path(tmp_path / "out", "middle")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    shutil.rmtree(tmp_path / "cache")
    aligner(pair, tmp_path / "out").run()
    assert made == ["middle"] * 2


def test_an_anchor_can_be_chosen_and_a_proxy_is_left_out(models, tmp_path) -> None:
    proxy = replace(models["small"], quantization="int8")
    assert aligner({**models, "proxy": proxy}, tmp_path).models == ("small", "middle", "org/big")
    chosen = aligner(models, tmp_path, adapter=replace(ADAPTER, anchor="middle"))
    assert chosen.models == ("middle", "small", "org/big")
    with pytest.raises(ConfigError, match="no model 'huge' to be the anchor"):
        aligner(models, tmp_path, anchor="huge")
    with pytest.raises(ConfigError, match="another model, got small"):
        aligner({"small": models["small"]}, tmp_path)


@pytest.fixture
def folder(models, tmp_path) -> Path:
    aligner(models, tmp_path / "out").run()
    return tmp_path / "out"


def load(folder: Path, models: dict[str, ModelSpec], name: str, **changes: Any) -> Any:
    adapter = replace(ADAPTER, **changes)
    return load_alignment(
        str(folder), name, models[name], outline_model(name, models[name]), adapter
    )


def test_adapters_without_aligned_factors_take_none() -> None:
    aligned = Experiment(adapter=replace(ADAPTER, alignment="folder"))
    assert [name for name in ADAPTERS if wants_alignment(aligned, name)] == ["pq_lora"]
    assert not any(wants_alignment(Experiment(adapter=ADAPTER), name) for name in ADAPTERS)


def test_files_are_loaded_for_what_they_were_made_for(folder, models) -> None:
    found = load(folder, models, "org/big")
    assert len(found) == 2 * 7 * 2
    assert found["1/down_proj/A"].shape == (2, 64)
    assert found["1/down_proj/B"].shape == (32, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, "rank: expected 4, got 2"),
        ({"num_blocks": 1}, "num_blocks: expected 1, got 2"),
        ({"target_modules": ("q_proj",)}, "target_modules: expected q_proj, got down_proj, gate"),
    ],
)
def test_another_adapter_is_refused(folder, models, changes, message) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        load(folder, models, "middle", **changes)
    assert "does not fit model 'middle'" in str(caught.value)
    assert "fedmosaic align" in str(caught.value)


def test_another_model_is_refused(folder, models, tmp_path) -> None:
    swapped = {**models, "middle": models["small"]}
    with pytest.raises(AdapterError, match="signature: expected llama-"):
        load(folder, swapped, "middle")
    same_shape = save_text_model(tmp_path / "m", hidden=16, layers=3, seed=9)
    tuned = {**models, "middle": ModelSpec(path=str(same_shape))}
    with pytest.raises(AdapterError, match="weights: expected") as caught:
        load(folder, tuned, "middle")
    assert "signature" not in caught.value.message


def test_missing_foreign_and_mixed_files_are_refused(folder, models) -> None:
    shutil.copy(tensors_path(folder, "small"), tensors_path(folder, "middle"))
    with pytest.raises(AdapterError, match="not what its manifest was written for"):
        load(folder, models, "middle")
    tensors_path(folder, "middle").unlink()
    with pytest.raises(AdapterError, match="cannot read the alignment file"):
        load(folder, models, "middle")
    manifest_path(folder, "middle").write_text('{"format": 99}')
    with pytest.raises(AdapterError, match="of format 1, got 99"):
        load(folder, models, "middle")
    manifest_path(folder, "middle").write_text('{"format": 1}')
    with pytest.raises(AdapterError, match="no alignment manifest"):
        load(folder, models, "middle")
    manifest_path(folder, "middle").unlink()
    with pytest.raises(AdapterError, match=r"'middle' has no alignment.*middle\.json"):
        load(folder, models, "middle")


def test_a_run_refuses_models_with_different_anchors(folder, models, tmp_path) -> None:
    other = tmp_path / "seed1"
    aligner(models, other, options=replace(OPTIONS, seed=1)).run()
    for path in other.glob("middle.*"):
        shutil.copy(path, folder)
    experiment = Experiment(models=models, adapter=replace(ADAPTER, alignment=str(folder)))
    outlines = {name: outline_model(name, spec) for name, spec in models.items()}
    with pytest.raises(AdapterError, match=r"different anchors: .*seeds 0 and 1|seeds 1 and 0"):
        check_alignments(experiment, outlines, ["fedmosaic"])
    del outlines["middle"]
    check_alignments(experiment, outlines, ["fedmosaic"])
    outlines["none"] = outline_model("none", models["small"])
    check_alignments(experiment, outlines, ["fedavg", "local"])  # plain LoRA has no use for them


@pytest.fixture
def world(tmp_path: Path) -> Experiment:
    config = write_world(tmp_path)
    text = config.read_text().replace("num_blocks: 2", "num_blocks: 2, alignment: aligned")
    config.write_text(text)
    return load_experiment(config)


def test_a_run_starts_from_the_aligned_factors(world, tmp_path) -> None:
    folder = Path(world.adapter.alignment or "")
    assert folder == tmp_path / "aligned"
    with pytest.raises(AdapterError, match="'large' has no alignment"):
        prepare_run(world, tmp_path / "run")
    assert missing_offline(world) == [
        f"alignment of model {name}: {name}.json missing in {folder}; "
        "make it with 'fedmosaic align --cf FILE'"
        for name in ("small", "large")
    ]
    data = public_data(world, ["train"])
    assert len(data.samples) == 24
    ModelAligner(world, data, folder, options=OPTIONS).run()
    assert missing_offline(world) == []
    prepared = prepare_run(world, tmp_path / "run")
    pool = EnginePool(world, prepared.bundles, "pq_lora")
    try:
        for name in ("small", "large"):
            expected = read_tensors(tensors_path(folder, name))
            shared = {
                f"{key.block}/{key.module}/{key.part}": tensor
                for key, tensor in pool.engine(name).initial_adapter().items()
                if key.branch is Branch.SHARED and key.part in (Part.A, Part.B)
            }
            assert shared.keys() == expected.keys()
            assert all(torch.equal(shared[key], value) for key, value in expected.items())
    finally:
        pool.close()


def test_the_anchor_has_what_a_run_without_alignment_draws(world, tmp_path) -> None:
    ModelAligner(
        world, public_data(world, ["train"]), tmp_path / "a", options=replace(OPTIONS, seed=1)
    ).run()
    anchor = read_tensors(tensors_path(tmp_path / "a", "small"))
    plain = replace(world, adapter=replace(world.adapter, alignment=None))
    small = {"small": load_model("small", world.models["small"], torch.device("cpu"))}
    pool = EnginePool(plain, small, "pq_lora")
    try:
        drawn = pool.engine("small").initial_adapter()
    finally:
        pool.close()
    same = [
        torch.equal(tensor, anchor[f"{key.block}/{key.module}/{key.part}"])
        for key, tensor in drawn.items()
        if key.branch is Branch.SHARED and key.part in (Part.A, Part.B)
    ]
    assert len(same) == 28
    assert all(same)


def test_public_data_come_from_options_then_from_the_data_root(world, tmp_path) -> None:
    with pytest.raises(DataError, match="no public samples to align on"):
        public_data(world)
    file = tmp_path / "data/dataset/Chat/public/dataset-0.json"
    file.parent.mkdir(parents=True)
    row = {"conversations": [{"value": "which animal ?"}, {"value": "cat"}]}
    file.write_text(json.dumps([row] * 5))
    assert len(public_data(world).samples) == 5
    assert public_data(world).source == ("public split",)
    both = public_data(world, [str(file), "train"])
    assert len(both.samples) == 29
    assert both.source == ("dataset-0.json", "clients' training samples")


def test_the_bundled_models_are_aligned_on_their_pretraining_images(monkeypatch) -> None:
    monkeypatch.setattr(aligner_module, "_ROWS_PER_TASK", 2)
    experiment = load_experiment(None)
    data = public_data(experiment)
    assert all(sample.images for sample in data.samples)
    assert data.source == ("quickstart, pretraining images",)
    bundled = replace(experiment.adapter, alignment="bundled")
    name = next(iter(experiment.models))
    spec = experiment.models[name]
    found = load_alignment("bundled", name, spec, outline_model(name, spec), bundled)
    assert {key.rpartition("/")[2] for key in found} == {"A", "B"}
