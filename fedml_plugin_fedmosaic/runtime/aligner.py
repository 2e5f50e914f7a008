"""Aligns the models of an experiment: which ones, on which samples, and only if it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from fedml_plugin_fedmosaic.adapters.structure import resolved_names
from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.config.sections import Experiment, ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.core.registry import DATASETS
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.public import public_split, samples_at, samples_digest
from fedml_plugin_fedmosaic.data.text_tasks import default_root
from fedml_plugin_fedmosaic.engine.base import ModelInfo
from fedml_plugin_fedmosaic.engine.fingerprint import model_fingerprint
from fedml_plugin_fedmosaic.engine.hub import require_models
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.engine.observe import ActivationObserver
from fedml_plugin_fedmosaic.engine.outline import outline_model
from fedml_plugin_fedmosaic.runtime.alignment_files import (
    FORMAT,
    METHOD,
    AlignmentManifest,
    ModelIdentity,
    alignment_key,
    recall,
    remember,
    write_alignment,
)
from fedml_plugin_fedmosaic.runtime.alignment_fit import PairAligner, initial_factors
from fedml_plugin_fedmosaic.runtime.alignment_options import AlignOptions, Progress

TRAIN = "train"
"""Stands for the clients' own training samples."""
_ROWS_PER_TASK = 400
"""Public samples per task of the bundled quickstart."""
_PACKAGES = ("fedml_plugin_fedmosaic", "torch", "transformers", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicData:
    """Samples that all models are observed on.

    Attributes:
        samples: at least four.
        source: what they are, in words that hold on any machine.
    """

    samples: tuple[Sample, ...]
    source: tuple[str, ...]


def public_data(experiment: Experiment, sources: Sequence[str] = ()) -> PublicData:
    """The public samples of an alignment.

    Args:
        experiment: its data section says where its public split is.
        sources: JSON files of samples, data roots, or ``train`` for the clients' own training
            samples, which only a simulation can see. The experiment's public split when empty.

    Raises:
        DataError: there are none, or they are wrong.
    """
    if sources:
        samples: list[Sample] = []
        names = []
        for source in sources:
            found = _training(experiment) if source == TRAIN else samples_at(Path(source))
            samples += found
            names.append("clients' training samples" if source == TRAIN else Path(source).name)
        return PublicData(samples=tuple(samples), source=tuple(names))
    if experiment.data.source == "quickstart":
        return PublicData(samples=_quickstart(), source=("quickstart, pretraining images",))
    root = _data_root(experiment)
    samples = [] if root is None else list(public_split(root))
    if not samples:
        raise DataError(
            "there are no public samples to align on: expected files "
            "dataset/<name>/public/dataset-<subset>.json below data.root, or --data",
            hint="give --data FILE.json, or --data train for the clients' own samples, which only "
            "a simulation can see",
        )
    return PublicData(samples=tuple(samples), source=("public split",))


def _data_root(experiment: Experiment) -> Path | None:
    """Where the data set looks for its files; None if it does not say."""
    if experiment.data.root is not None:
        return Path(experiment.data.root).expanduser()
    return default_root() if experiment.data.source == "text" else None


def _training(experiment: Experiment) -> list[Sample]:
    data = DATASETS[experiment.data.source](experiment.data)
    rows = (row for client in data.clients for task in client.train for row in task)
    return list(dict.fromkeys(rows))


def _quickstart() -> tuple[Sample, ...]:
    """The samples that the bundled models were made with, which no client has."""
    from fedml_plugin_fedmosaic.runtime.pretrain import Recipe, pretraining_samples

    folder = cache_dir() / "quickstart-public"
    rows = pretraining_samples(folder, Recipe(rows_per_task=_ROWS_PER_TASK), seed=0)
    return tuple(row for task in rows.values() for row in task)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    name: str
    spec: ModelSpec
    info: ModelInfo
    identity: ModelIdentity
    modules: tuple[str, ...]
    """Names of its aligned linears, ascending."""


class ModelAligner:
    """Aligns all models of an experiment with one of them, and writes their files.

    Two models are in memory at a time. What is in the output folder or in the user's cache already
    is not made again, so that an interrupted call goes on where it was.

    P and Q of two models are mixed only if their adapted linears have the same names. With
    ``all-linear`` that is decided by the architectures: models with other names than the anchor's
    are aligned among themselves, with the smallest of them.

    Args:
        experiment: models, adapter and device.
        data: public samples.
        out: folder of the files.
        anchor: name of the model whose coordinates count; ``adapter.anchor``, or the smallest,
            when None.
        options: how to align.

    Attributes:
        anchor: its name.
        anchors: name of every model -> the model whose coordinates it takes.
        models: names of the models to align, the anchor first; models with another anchor follow,
            each such anchor before its own.

    Raises:
        ConfigError: there is no second model, no such anchor, a model is missing, or no two models
            have linears of the same names.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: PublicData,
        out: Path,
        *,
        anchor: str | None = None,
        options: AlignOptions | None = None,
    ) -> None:
        # A model with torchao's weights is the proxy only; nobody trains an adapter on it.
        specs = {n: s for n, s in experiment.models.items() if s.quantization != "int8"}
        anchor = anchor or experiment.adapter.anchor
        if anchor is not None and anchor not in specs:
            raise ConfigError(
                f"there is no model {anchor!r} to be the anchor; models: {', '.join(specs)}"
            )
        if len(specs) < 2:
            raise ConfigError(
                f"alignment needs an anchor and another model, got {', '.join(specs) or 'none'}",
                hint="models of one architecture share their adapters without any alignment",
            )
        require_models(specs)
        self._experiment = experiment
        self._data = data
        self._out = out
        self._options = options or AlignOptions()
        targets = experiment.adapter.target_modules
        found = [_identified(name, spec, targets) for name, spec in specs.items()]
        found.sort(key=lambda model: (model.info.num_parameters, model.name))
        self._models = {model.name: model for model in found}
        self.anchor = anchor or found[0].name
        self.anchors = _anchors(self._models, self.anchor)
        leaders = dict.fromkeys([self.anchor, *self.anchors.values()])
        self.models = tuple(
            name
            for leader in leaders
            for name in dict.fromkeys([leader, *self._models])
            if self.anchors[name] == leader
        )
        self._digest = samples_digest(data.samples)
        self._device = torch.device(
            "cuda" if experiment.device.using_gpu and torch.cuda.is_available() else "cpu"
        )
        self._bundle: ModelBundle | None = None

    def key(self, name: str) -> str:
        """Name of everything that a model's files follow from."""
        anchor, model = self._models[self.anchors[name]].identity, self._models[name].identity
        adapter = self._experiment.adapter
        places = [adapter.rank, adapter.num_blocks, list(self._models[name].modules)]
        if self.anchors[name] == name:
            return alignment_key(anchor=anchor.weights, places=places, seed=self._options.seed)
        return alignment_key(
            anchor=[anchor.weights, anchor.dtype],
            model=[model.weights, model.dtype],
            places=places,
            data=self._digest,
            options=asdict(self._options),
        )

    def run(
        self,
        *,
        force: bool = False,
        progress: Callable[[str], Progress] | None = None,
        done: Callable[[AlignmentManifest, bool], None] | None = None,
    ) -> dict[str, AlignmentManifest]:
        """Makes the files of all models.

        Args:
            force: make them even if they are there.
            progress: gives the progress of a model.
            done: told each manifest, and whether it was there already.

        Returns:
            Manifests by model name, the anchor's first.

        Raises:
            AdapterError: the models do not fit together, or a file cannot be written.
            DataError: a sample is wrong.
        """
        manifests: dict[str, AlignmentManifest] = {}
        try:
            for name in self.models:
                known = None if force else recall(self._out, name, self.key(name))
                if known is None:
                    manifests[name] = self._make(name, progress(name) if progress else None)
                    remember(self._out, name, self.key(name))
                else:
                    manifests[name] = known
                if done is not None:
                    done(manifests[name], known is not None)
        finally:
            self._bundle = None
        return manifests

    def _make(self, name: str, progress: Progress | None) -> AlignmentManifest:
        started = time.perf_counter()
        experiment, model = self._experiment, self._models[name]
        adapter = replace(experiment.adapter, target_modules=model.modules)
        anchor = self._models[self.anchors[name]]
        if self._bundle is None or self._bundle.info.name != anchor.name:
            self._bundle = None  # its memory is given back before the next one is loaded
            self._bundle = load_model(anchor.name, anchor.spec, self._device)
        if name == anchor.name:
            observer = ActivationObserver(self._bundle, model.modules, adapter.num_blocks)
            drawn = initial_factors(observer.targets, adapter.rank, self._options.seed)
            factors = {key: value.float() for key, value in drawn.items()}
            quality = None
        else:
            bundle = load_model(name, model.spec, self._device)
            pair = PairAligner(self._bundle, bundle, adapter, self._options, progress)
            found = pair.run(self._data.samples)
            factors, quality = found.factors, found.quality
        return write_alignment(
            self._out,
            name,
            factors,
            {
                "format": FORMAT,
                "key": self.key(name),
                "method": METHOD,
                "model": model.identity,
                "anchor": anchor.identity,
                "rank": adapter.rank,
                "num_blocks": adapter.num_blocks,
                "target_modules": model.modules,
                "data": {
                    "source": list(self._data.source),
                    "num_samples": len(self._data.samples),
                    "digest": self._digest,
                },
                "options": asdict(self._options),
                "versions": _versions(),
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "duration_s": round(time.perf_counter() - started, 3),
                "quality": quality,
            },
        )


def _anchors(models: Mapping[str, _Model], anchor: str) -> dict[str, str]:
    """Model -> anchor: the first with the same linears, and the given one for those of its names.

    Raises:
        ConfigError: every model would be its own anchor.
    """
    firsts = {models[anchor].modules: anchor}
    found = {name: firsts.setdefault(model.modules, name) for name, model in models.items()}
    if len(firsts) == len(models):
        names = [set(model.modules) for model in models.values()]
        common = ", ".join(sorted(set.intersection(*names)))
        raise ConfigError(
            "no two models have linears of the same names, so nothing can be aligned:\n"
            + "\n".join(f"{name}: {', '.join(model.modules)}" for name, model in models.items()),
            hint=f"all have these: --set 'adapter.target_modules=[{common}]'"
            if common
            else "such models share no P and Q; run them without adapter.alignment",
        )
    return found


def _identified(name: str, spec: ModelSpec, target_modules: tuple[str, ...]) -> _Model:
    info = outline_model(name, spec)
    identity = ModelIdentity(
        name=name,
        family=info.family,
        size=info.size,
        signature=info.signature,
        num_layers=info.num_layers,
        num_parameters=info.num_parameters,
        weights=model_fingerprint(name, spec),
        dtype=spec.dtype if spec.quantization == "none" else f"{spec.dtype}, {spec.quantization}",
    )
    modules = tuple(resolved_names(target_modules, info.linears))
    return _Model(name=name, spec=spec, info=info, identity=identity, modules=modules)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


__all__ = ["ModelAligner", "PublicData", "public_data"]
