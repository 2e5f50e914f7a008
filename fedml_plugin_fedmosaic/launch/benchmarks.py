"""Benchmarks: a name for several configurations that are compared with the same strategies.

A benchmark is one YAML file: bundled in ``configs/benchmarks/``, or one's own::

    title: DRAKE-lite
    strategies: [local, fedavg, fedmosaic]   # all of the shelf when omitted
    seeds: 3
    configs:                                 # label: configuration, relative to this file
      dynamic: ../drake_lite/dynamic.yaml
      static: {cf: ../drake_lite/dynamic.yaml, set: {data.split: static}}
    unseen: [unseen]                         # scenarios of tasks that no client has (optional)
    settings:                                # what one strategy has for itself (optional)
      fedmosaic: {learning_rate: 4.0e-3}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.loader import bundled_folders
from fedml_plugin_fedmosaic.config.messages import unknown
from fedml_plugin_fedmosaic.config.yamlfile import Document, as_mapping, read_document
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.launch.comparison import (
    ALL,
    Settings,
    chosen_strategies,
    own_settings,
)
from fedml_plugin_fedmosaic.launch.sweep_space import override

FOLDER = "benchmarks"
_KEYS = ("title", "strategies", "seeds", "configs", "unseen", "settings")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """One experiment of a benchmark.

    Attributes:
        cf: configuration file.
        overrides: ``--set`` texts.
    """

    cf: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark file, checked.

    Attributes:
        name: of the file.
        title: for pages.
        strategies: registry names.
        seeds: number of seeds.
        configs: label -> experiment.
        unseen: scenarios of tasks that no client has.
        settings: what single strategies have for themselves.
    """

    name: str
    title: str
    strategies: tuple[str, ...]
    seeds: int
    configs: Mapping[str, BenchmarkConfig]
    unseen: tuple[str, ...] = field(default=())
    settings: Settings = field(default_factory=dict)


def benchmark_files() -> dict[str, Path]:
    """The bundled benchmarks by name."""
    found: dict[str, Path] = {}
    for folder in bundled_folders():
        for path in sorted((folder / FOLDER).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load_benchmark(name: str) -> Benchmark:
    """Reads a bundled benchmark by its name, or a file.

    Raises:
        ConfigError: there is none of that name, or the file is wrong; every mistake is listed.
    """
    known = benchmark_files()
    path = known.get(name, Path(name))
    if name not in known and not (name.endswith((".yaml", ".yml")) and path.is_file()):
        raise ConfigError(
            unknown("benchmark", name, list(known)), hint="or give a benchmark file, NAME.yaml"
        )
    document = read_document(path)
    for key in document.data:
        if key not in _KEYS:
            document.report((key,), unknown("key", key, _KEYS))
    title = document.data.get("title", path.stem)
    if not isinstance(title, str) or not title:
        document.report(("title",), f"must be text (got {title!r})")
    seeds = document.data.get("seeds", 3)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        document.report(("seeds",), f"must be a whole number >= 1 (got {seeds!r})")
    names = _texts(document, "strategies", [ALL])
    unseen = _texts(document, "unseen", [])
    configs = _configs(document, path.resolve().parent)
    settings = _settings(document)
    document.raise_problems()
    return Benchmark(
        name=path.stem,
        title=title,
        strategies=chosen_strategies(",".join(names)),
        seeds=seeds,
        configs=configs,
        unseen=tuple(unseen),
        settings=settings,
    )


def _texts(document: Document, key: str, default: list[str]) -> list[str]:
    value = document.data.get(key, default)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        document.report((key,), f"must be a list of names (got {value!r})")
        return default
    return value


def _settings(document: Document) -> Settings:
    found: dict[str, Mapping[str, Any]] = {}
    raw = as_mapping(document.data.get("settings", {}))
    if raw is None:
        document.report(("settings",), "must map strategies to keys and values")
    for name, value in (raw or {}).items():
        changes = as_mapping(value)
        if not changes:
            document.report(("settings", str(name)), f"must map keys to values (got {value!r})")
            continue
        try:
            found |= own_settings((str(name), str(key), item) for key, item in changes.items())
        except ConfigError as error:
            document.report(("settings", str(name)), error.message)
    return found


def _configs(document: Document, folder: Path) -> dict[str, BenchmarkConfig]:
    raw = as_mapping(document.data.get("configs"))
    if not raw:
        document.report(("configs",), "must map labels to configuration files")
        return {}
    found: dict[str, BenchmarkConfig] = {}
    for label, value in raw.items():
        place = ("configs", str(label))
        entry = as_mapping({"cf": value} if isinstance(value, str) else value) or {}
        cf, changes = entry.get("cf"), as_mapping(entry.get("set", {}))
        if not _LABEL.fullmatch(str(label)):
            document.report(place, "a label is letters, digits, '-', '_' and '.'")
        elif not isinstance(cf, str) or changes is None or set(entry) - {"cf", "set"}:
            document.report(
                place, f"must be a path, or {{cf: path, set: {{key: value}}}} (got {value!r})"
            )
        elif not (folder / cf).is_file():
            document.report(place, f"there is no file {cf}")
        else:
            found[str(label)] = BenchmarkConfig(
                cf=(folder / cf).resolve(),
                overrides=tuple(override(key, item) for key, item in changes.items()),
            )
    return found
