"""DRAKE-lite: forty small tasks in DRAKE's layout, from images that everybody can get.

``fedmosaic data build drake-lite`` writes it into the cache; ``data.source: drake-lite`` reads it
from there, or from ``data.root``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.data.drake import load_drake, open_scenario
from fedml_plugin_fedmosaic.data.lite.build import VERSION, build_folder
from fedml_plugin_fedmosaic.data.lite.scenarios import scenario_clients, scenarios_of
from fedml_plugin_fedmosaic.data.lite.sources import open_library
from fedml_plugin_fedmosaic.data.lite.tasks import Variant
from fedml_plugin_fedmosaic.data.scenario import ScenarioClient

__all__ = ["LiteSource", "build_lite", "lite_folder", "load_lite", "located"]

SCENARIO = "heterogeneous"
"""The scenario of a configuration that names none."""

_BUILD = "run 'fedmosaic data build drake-lite'"


def lite_folder(variant: Variant = "full") -> Path:
    """Where a variant is built when no folder is named: below the cache."""
    return cache_dir() / ("drake-lite" if variant == "full" else f"drake-lite-{variant}")


def build_lite(
    out: Path | None, variant: Variant, say: Callable[[str], object], *, fetch: bool = True
) -> Path:
    """Builds a variant.

    Args:
        out: folder; the variant's own below the cache when None.
        variant: ``full``, or ``packages`` for what registries hold.
        say: told what happens.
        fetch: whether the network may be used.

    Returns:
        The folder.

    Raises:
        DataError: a source is missing or wrong, or the folder cannot be written.
    """
    folder = out or lite_folder(variant)
    library, records = open_library(variant, say, fetch=fetch)
    build_folder(folder, library, variant, sources=records, say=say)
    return folder


def located(config: DataConfig) -> DataConfig:
    """The configuration of the published layout that this one means.

    Raises:
        DataError: DRAKE-lite is not built there, or by another version of this package.
    """
    root = Path(config.root).expanduser() if config.root else lite_folder()
    if not (root / "build.json").is_file():
        raise DataError(
            f"DRAKE-lite: expected it built in {root}, got no build.json there",
            hint=f"{_BUILD}, or set data_args: {{data: {{root: FOLDER}}}}",
        )
    _check_version(root)
    return replace(config, source="drake", root=str(root), scenario=config.scenario or SCENARIO)


def _check_version(root: Path) -> None:
    """Base models know the words of the version that they were trained for, and no others."""
    try:
        found = json.loads((root / "build.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{root / 'build.json'}: expected the version of DRAKE-lite, got no readable one",
            hint=_BUILD,
        ) from error
    if found != VERSION:
        raise DataError(
            f"{root}: expected version {VERSION} of DRAKE-lite, got {found}",
            hint=f"{_BUILD}, then 'fedmosaic models build-drake-lite'",
        )


def load_lite(config: DataConfig) -> FederatedData:
    """Loads DRAKE-lite as any folder in the published layout.

    Args:
        config: ``root`` is the built folder, the one below the cache when omitted; ``scenario`` is
            a name in its ``scenarios``.

    Raises:
        DataError: it is not built, or a file is wrong.
    """
    return load_drake(located(config))


class LiteSource:
    """Builds DRAKE-lite, fetching its sources."""

    def missing(self, config: DataConfig) -> list[str]:
        """One line if it is not built."""
        try:
            open_scenario(located(config))
        except DataError as error:
            return error.message.splitlines()
        return []

    def models(self, config: DataConfig) -> frozenset[str] | None:
        """Those of the scenario's clients."""
        try:
            return frozenset(client.model_id for client in self.clients(config))
        except DataError:
            return None

    def clients(self, config: DataConfig) -> tuple[ScenarioClient, ...]:
        """Those of the scenario, also before anything is built.

        Raises:
            DataError: there is no such scenario.
        """
        if not self.missing(config):
            return open_scenario(located(config))[1]
        name = config.scenario or SCENARIO
        known = scenarios_of("full")
        if name not in known:
            raise DataError(
                f"DRAKE-lite has no scenario {name!r}", hint=f"known: {', '.join(sorted(known))}"
            )
        return scenario_clients("full", name)

    def fetch(self, config: DataConfig, repository: str | None, say: Callable[[str], None]) -> Path:
        """Builds it unless it is there."""
        if repository is not None:
            raise DataError("DRAKE-lite is not on the hub; leave --repo out")
        folder = Path(config.root).expanduser() if config.root else lite_folder()
        if not self.missing(config):
            say(f"{folder}: there already")
            return folder
        return build_lite(folder, "full", say)
