"""``all-linear`` in an alignment: linears are named by the architectures, not by a list."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, GATED, PHI, save_family
from tiny_models import save_text_model, text_samples

from fedml_plugin_fedmosaic.adapters.pq_lora.inject import inject_pq_lora
from fedml_plugin_fedmosaic.config.sections import AdapterConfig, Experiment, ModelSpec
from fedml_plugin_fedmosaic.core.errors import AdapterError, ConfigError
from fedml_plugin_fedmosaic.core.types import Branch, Part
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.outline import outline_model
from fedml_plugin_fedmosaic.report.alignment import read_alignments, warnings_of
from fedml_plugin_fedmosaic.runtime.aligner import ModelAligner, PublicData
from fedml_plugin_fedmosaic.runtime.alignment import check_alignments, load_alignment
from fedml_plugin_fedmosaic.runtime.alignment_files import read_manifest
from fedml_plugin_fedmosaic.runtime.alignment_options import AlignOptions

CPU = torch.device("cpu")
ALL = AdapterConfig(rank=2, num_blocks=2, target_modules=("all-linear",))
OPTIONS = AlignOptions(learning_rate=1e-2, positions="all")
DATA = PublicData(samples=text_samples(16), source=("tests",))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    """Two architectures with the same names of linears, and two sizes of one with others."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_family(root / name, name) for name in ("llama", "gemma3", "phi")}
    folders["phi-tuned"] = save_family(root / "phi-tuned", "phi", template=False)
    folders["little"] = save_text_model(root / "little", hidden=16, layers=2)
    return {name: ModelSpec(path=str(folder)) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))


def aligner(
    models: dict[str, ModelSpec], names: tuple[str, ...], out: Path, **changes: Any
) -> ModelAligner:
    experiment = Experiment(
        models={name: models[name] for name in names}, adapter=replace(ALL, **changes)
    )
    return ModelAligner(experiment, DATA, out, anchor=names[0], options=OPTIONS)


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_an_outline_knows_the_linears(models: dict[str, ModelSpec], name: str) -> None:
    assert outline_model(name, models[name]).linears == FAMILIES[name].linears
    assert load_model(name, models[name], CPU).info.linears == FAMILIES[name].linears


def test_all_linears_of_two_architectures_are_aligned(models, tmp_path) -> None:
    found = aligner(models, ("llama", "gemma3"), tmp_path).run()
    expected = {f"{block}/{module}" for block in range(2) for module in GATED}
    manifest = found["gemma3"]
    assert set(manifest.quality.linears) == expected
    assert manifest.target_modules == GATED  # names, so that files can be read without the option
    for quality in manifest.quality.linears.values():
        assert quality.residual_before > 0.0
        assert 0.0 <= quality.agreement <= 1.0
    # The run that the files are for: each model takes its own, wherever a block ends.
    experiment = Experiment(models=models, adapter=replace(ALL, alignment=str(tmp_path)))
    outlines = {name: outline_model(name, models[name]) for name in found}
    check_alignments(experiment, outlines, ["fedmosaic"])
    for name, info in outlines.items():
        factors = load_alignment(str(tmp_path), name, models[name], info, ALL)
        bundle = load_model(name, models[name], CPU)
        handle = inject_pq_lora(bundle.model, ALL, bundle.num_layers, seed=0, alignment=factors)
        shared = {
            f"{key.block}/{key.module}/{key.part}": value
            for key, value in handle.parameters().items()
            if key.branch is Branch.SHARED and key.part is not Part.GATE
        }
        assert shared.keys() == factors.keys()
        assert all(torch.equal(value, factors[key]) for key, value in shared.items())


def test_the_names_themselves_are_the_same_alignment(models, tmp_path) -> None:
    names = ("llama", "gemma3")
    aligner(models, names, tmp_path).run()
    known = []
    listed = aligner(models, names, tmp_path, target_modules=GATED)
    listed.run(done=lambda manifest, there: known.append(there))
    assert known == [True, True]
    info = outline_model("gemma3", models["gemma3"])
    fewer = replace(ALL, target_modules=("q_proj",))
    with pytest.raises(AdapterError, match="target_modules: expected q_proj, got down_proj"):
        load_alignment(str(tmp_path), "gemma3", models["gemma3"], info, fewer)


def test_models_with_other_linears_have_an_anchor_of_their_own(models, tmp_path) -> None:
    made = aligner(models, ("llama", "phi", "gemma3", "phi-tuned"), tmp_path)
    assert made.models == ("llama", "gemma3", "phi", "phi-tuned")
    assert made.anchors == {"llama": "llama", "gemma3": "llama", "phi": "phi", "phi-tuned": "phi"}
    found = made.run()
    assert [name for name, manifest in found.items() if manifest.is_anchor] == ["llama", "phi"]
    assert found["phi-tuned"].anchor.name == "phi"
    assert found["phi-tuned"].target_modules == PHI
    experiment = Experiment(models=models, adapter=replace(ALL, alignment=str(tmp_path)))
    outlines = {name: outline_model(name, models[name]) for name in found}
    check_alignments(experiment, outlines, ["fedmosaic"])
    lines = [line for line in warnings_of(read_alignments(tmp_path)) if "not mixed" in line]
    assert [line.partition(":")[0] for line in lines] == ["phi", "phi-tuned"]
    assert "Both have adapter.target_modules: [k_proj, q_proj, v_proj]" in lines[0]
    # A file of another anchor is still refused among models that are mixed.
    other = tmp_path / "other"
    aligner(models, ("phi-tuned", "phi"), other).run()
    for path in other.glob("phi.*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(AdapterError, match="'phi' and 'phi-tuned' are aligned with different"):
        check_alignments(experiment, outlines, ["fedmosaic"])


def test_nothing_in_common_is_explained(models, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no two models have linears of the same names") as caught:
        aligner(models, ("llama", "phi"), tmp_path)
    assert "phi: dense, fc1, fc2, k_proj, q_proj, v_proj" in caught.value.message
    assert "adapter.target_modules=[k_proj, q_proj, v_proj]" in (caught.value.hint or "")
    # What the hint says works, across the two architectures.
    common = ("k_proj", "q_proj", "v_proj")
    found = aligner(models, ("llama", "phi"), tmp_path, target_modules=common).run()
    assert set(found["phi"].quality.linears) == {f"{b}/{name}" for b in range(2) for name in common}


def test_a_model_without_a_partner_keeps_its_own_coordinates(models, tmp_path) -> None:
    found = aligner(models, ("little", "llama", "phi"), tmp_path).run()
    assert found["phi"].is_anchor
    assert read_manifest(tmp_path, "phi").target_modules == PHI
    assert found["llama"].anchor.name == "little"
