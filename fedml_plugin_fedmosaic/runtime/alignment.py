"""Aligned A and B for a run: found by ``adapter.alignment``, and checked to be the right ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path

from fedml_plugin_fedmosaic.adapters.structure import resolved_names
from fedml_plugin_fedmosaic.config.sections import AdapterConfig, Experiment, ModelSpec
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.engine.base import ModelInfo
from fedml_plugin_fedmosaic.engine.fingerprint import model_fingerprint
from fedml_plugin_fedmosaic.runtime.alignment_files import (
    Alignment,
    AlignmentManifest,
    manifest_path,
    read_manifest,
    read_tensors,
    tensors_path,
)
from fedml_plugin_fedmosaic.runtime.alignment_regression import FILE_NAME

BUNDLED = "bundled"
_WITHOUT = frozenset({"lora", "dual_lora"})
"""Adapters without aligned factors; strategies that train them run beside others."""
_MAKE = "make it with 'fedmosaic align --cf FILE'"


def wants_alignment(experiment: Experiment, adapter: str) -> bool:
    """Whether a strategy with this adapter takes aligned A and B."""
    return experiment.adapter.alignment is not None and adapter not in ("lora", "dual_lora")


def load_alignment(
    source: str, name: str, spec: ModelSpec, info: ModelInfo, adapter: AdapterConfig
) -> Alignment:
    """Aligned A and B of one model.

    Args:
        source: ``bundled``, or the folder that ``fedmosaic align`` wrote.
        name: the model's name in the configuration.
        spec: of the model.
        info: what it is.
        adapter: rank, blocks and modules that the tensors must have.

    Returns:
        ``<block>/<module>/A`` (r, d_in) and ``/B`` (d_out, r).

    Raises:
        AdapterError: a file is missing, damaged, or made for something else.
    """
    if source == BUNDLED:
        # Beside the model, without a manifest: only the shapes are checked, by the adapter.
        return read_tensors(_bundled_file(spec.path))
    found = fitting_manifest(Path(source), name, spec, info, adapter)
    return read_tensors(tensors_path(Path(source), name), found.sha256)


def fitting_manifest(
    folder: Path, name: str, spec: ModelSpec, info: ModelInfo, adapter: AdapterConfig
) -> AlignmentManifest:
    """The manifest of a model's files.

    Raises:
        AdapterError: it is missing, or says that they are for another model, rank, number of
            blocks or modules.
    """
    found = read_manifest(folder, name)
    where = manifest_path(folder, name)
    if found is None:
        raise AdapterError(
            f"adapter.alignment: model {name!r} has no alignment in {str(folder)!r}: expected "
            f"{where.name} and {tensors_path(folder, name).name}",
            hint=f"{_MAKE}, or leave adapter.alignment out",
        )
    expected = {
        "signature": info.signature,
        "rank": adapter.rank,
        "num_blocks": adapter.num_blocks,
        "target_modules": ", ".join(resolved_names(adapter.target_modules, info.linears)),
        "weights": model_fingerprint(name, spec),
    }
    got = {
        "signature": found.model.signature,
        "rank": found.rank,
        "num_blocks": found.num_blocks,
        "target_modules": ", ".join(found.target_modules),
        "weights": found.model.weights,
    }
    wrong = [
        f"{key}: expected {expected[key]}, got {got[key]}"
        for key in got
        if got[key] != expected[key]
    ]
    if wrong:
        raise AdapterError(
            f"the alignment {where} does not fit model {name!r}:\n" + "\n".join(wrong),
            hint=f"{_MAKE} for this model and adapter",
        )
    return found


def check_alignments(
    experiment: Experiment, outlines: Mapping[str, ModelInfo], strategies: Iterable[str]
) -> None:
    """Checks the alignment of all clients' models before any of them is loaded.

    Args:
        experiment: the run.
        outlines: the clients' models.
        strategies: of the run.

    Raises:
        AdapterError: a file is missing or does not fit, or two models whose P and Q are mixed
            have another anchor.
    """
    source = experiment.adapter.alignment
    chosen = experiment.adapter.type
    adapters = {STRATEGIES[name].adapter if chosen == "auto" else chosen for name in strategies}
    wanted = any(wants_alignment(experiment, adapter) for adapter in adapters)
    if source is None or source == BUNDLED or not wanted:
        return
    manifests = {
        name: fitting_manifest(
            Path(source), name, experiment.models[name], info, experiment.adapter
        )
        for name, info in outlines.items()
    }
    # Models whose linears have other names never meet: their P and Q are not mixed.
    firsts: dict[tuple[str, ...], str] = {}
    for name, manifest in manifests.items():
        first = firsts.setdefault(manifest.target_modules, name)
        if manifest.coordinates != manifests[first].coordinates:
            raise AdapterError(
                f"models {first!r} and {name!r} are aligned with different anchors: "
                f"{manifests[first].anchor.name!r} and {manifest.anchor.name!r}, seeds "
                f"{manifests[first].options.get('seed')} and {manifest.options.get('seed')}",
                hint="align all models of a run together: 'fedmosaic align --cf FILE'",
            )


def missing_alignments(experiment: Experiment, models: Iterable[str]) -> list[str]:
    """One line for each model without alignment files, if the run takes any."""
    source, chosen = experiment.adapter.alignment, experiment.adapter.type
    adapter = STRATEGIES[experiment.algo].adapter if chosen == "auto" else chosen
    if source is None or source == BUNDLED or not wants_alignment(experiment, adapter):
        return []
    folder = Path(source)
    return [
        f"alignment of model {name}: {manifest_path(folder, name).name} missing in {folder}; "
        f"{_MAKE}"
        for name in models
        if not manifest_path(folder, name).is_file()
    ]


def _bundled_file(model_path: str) -> Path:
    name = model_path.removeprefix("bundled:")
    if name != model_path:
        return Path(str(files("fedml_plugin_fedmosaic"))) / "assets" / "models" / name / FILE_NAME
    return Path(model_path) / FILE_NAME
