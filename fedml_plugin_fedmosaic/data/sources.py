"""Where data sets come from: what a run will miss, and how to fetch it beforehand.

A member of the SOURCES shelf has the name of the data set that it feeds.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import TaskSpec
from fedml_plugin_fedmosaic.data.drake import open_scenario, sample_file
from fedml_plugin_fedmosaic.data.hub import published_checksum, reached, require_checksum
from fedml_plugin_fedmosaic.data.quickstart.build import SCENARIO, ensure_built
from fedml_plugin_fedmosaic.data.scenario import (
    DUMMY,
    ScenarioClient,
    bundled_scenarios,
    find_scenario,
    read_scenario,
)


class DataSource(Protocol):
    """Feeds one data set; made without arguments."""

    def missing(self, config: DataConfig) -> list[str]:
        """One line for everything that a run would not find and could not make itself."""
        ...

    def models(self, config: DataConfig) -> frozenset[str] | None:
        """Names of the models that the scenario uses; None if that cannot be said yet."""
        ...

    def fetch(self, config: DataConfig, repository: str | None, say: Callable[[str], None]) -> Path:
        """Gets what a run needs, and keeps what is there already.

        Args:
            config: which data, and where to put them.
            repository: ``owner/name`` of another data set repository on the hub.
            say: is told what happens.

        Returns:
            The folder with the data.

        Raises:
            DataError: it cannot be fetched, or something is still missing afterwards.
        """
        ...


class QuickstartSource:
    """The bundled federation: made from installed packages, without internet."""

    def missing(self, config: DataConfig) -> list[str]:  # noqa: ARG002 - a run can make it
        """Nothing."""
        return []

    def models(self, config: DataConfig) -> frozenset[str] | None:  # noqa: ARG002
        """Not said: all its models are bundled."""
        return None

    def clients(self, config: DataConfig) -> tuple[ScenarioClient, ...]:
        """Those of the bundled scenario, or of the one that is set."""
        if config.scenario not in (None, SCENARIO):
            return read_scenario(find_scenario(config.scenario))
        assets = resources.files("fedml_plugin_fedmosaic") / "assets" / "scenarios"
        with resources.as_file(assets / f"{SCENARIO}.json") as path:
            return read_scenario(path)

    def fetch(self, config: DataConfig, repository: str | None, say: Callable[[str], None]) -> Path:
        """Builds the images and rows in the cache."""
        if repository is not None:
            raise DataError("the quickstart is made from installed packages; leave --repo out")
        folder = ensure_built(None if config.root is None else Path(config.root).expanduser())
        say("built from installed packages; nothing was downloaded")
        return folder


class DrakeSource:
    """Data in the published layout: archives of the hub, unpacked in ``data.root``.

    Attributes:
        repository: the hub's data set repository: one ``NAME.tar`` per data set.
    """

    repository: str | None = "SNUMPR/DRAKE"

    def missing(self, config: DataConfig) -> list[str]:
        """The folder, the scenario, or the sample files of its tasks."""
        try:
            root, clients = open_scenario(config)
        except DataError as error:
            return error.message.splitlines()
        return [
            f"task {task.name}: no file {path}"
            for client in clients
            for task in client.tasks
            if task.dataset != DUMMY
            for split in ("train", "test")
            if not (path := sample_file(root, task, split)).is_file()
        ]

    def clients(self, config: DataConfig) -> tuple[ScenarioClient, ...]:
        """Those of the scenario; the data need not be there."""
        root = None if config.root is None else Path(config.root).expanduser()
        return read_scenario(find_scenario(config.scenario, root))

    def models(self, config: DataConfig) -> frozenset[str] | None:
        """Those of the scenario's clients."""
        try:
            return frozenset(client.model_id for client in self.clients(config))
        except DataError:
            return None

    def fetch(self, config: DataConfig, repository: str | None, say: Callable[[str], None]) -> Path:
        """Downloads and unpacks ``NAME.tar`` of every data set that the scenario lacks.

        A data set appears in ``data.root`` as a whole; one that is there is left alone, so that an
        interrupted command goes on where it was. Every archive is compared with the checksum that
        the hub gives for it before it is unpacked.
        """
        root, clients = open_scenario(_with_folder(config))
        tasks = [task for client in clients for task in client.tasks if task.dataset != DUMMY]
        self.fetch_tasks(root, tasks, repository, say)
        missing = self.missing(config)
        if missing:
            rest = f"\n... and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise DataError(
                "\n".join(["still missing after the download:", *missing[:5]]) + rest,
                hint="the scenario names subsets that the archives do not hold",
            )
        return root

    def fetch_tasks(
        self,
        root: Path,
        tasks: Sequence[TaskSpec],
        repository: str | None,
        say: Callable[[str], None],
    ) -> None:
        """Downloads and unpacks the data sets of tasks that are not there.

        Args:
            root: folder that holds ``dataset/``.
            tasks: any, each data set with all its subsets.
            repository: another data set repository on the hub.
            say: is told what happens.

        Raises:
            DataError: this source has no repository, or an archive cannot be fetched.
        """
        source = repository or self.repository
        for name in dict.fromkeys(task.dataset for task in tasks):
            own = [task for task in tasks if task.dataset == name]
            files = [sample_file(root, task, split) for task in own for split in ("train", "test")]
            if all(path.is_file() for path in files):
                say(f"{name}: there already")
                continue
            if source is None:
                raise DataError(
                    f"data set {name!r} is not there, and no repository of it is known",
                    hint=f"put its files where they belong, e.g. {files[0]}, or give --repo "
                    f"OWNER/NAME of a repository with {name}.tar",
                )
            say(f"{name}: fetching {name}.tar of {source}")
            _fetch_archive(source, name, root)


class HflbSource(DrakeSource):
    """The benchmark HFLB, published in the same layout as DRAKE."""

    repository = "SNUMPR/HFLB"


class FolderSource(DrakeSource):
    """Data in the same layout that are not published as archives: you put them there."""

    repository = None


def bundled_tasks(source: str) -> tuple[TaskSpec, ...]:
    """All tasks of the bundled scenarios that one source feeds: those in ``configs/<source>``.

    Args:
        source: ``drake`` or ``hflb``.

    Returns:
        Each task once, in the order of the scenarios' names; empty if there is none.
    """
    found: dict[str, TaskSpec] = {}
    for path in bundled_scenarios().values():
        if path.parent.parent.name != source:
            continue
        for client in read_scenario(path):
            found.update((task.name, task) for task in client.tasks)
    return tuple(found.values())


def _with_folder(config: DataConfig) -> DataConfig:
    """Makes the data root, so that data can be fetched into it."""
    if config.root is not None:
        try:
            (Path(config.root).expanduser() / "dataset").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{config.root} cannot be written: {error.strerror}") from error
    return config


def _fetch_archive(repository: str, name: str, root: Path) -> None:
    """Downloads one archive, goes on where an earlier download was cut, checks and unpacks it."""
    from huggingface_hub import hf_hub_download

    downloads = root / ".downloads"
    what = f"{name}.tar of data set {repository}"

    def download() -> Path:
        return Path(
            hf_hub_download(repository, f"{name}.tar", repo_type="dataset", local_dir=downloads)
        )

    archive = reached(what, download)
    checksum = reached(what, lambda: published_checksum(repository, f"{name}.tar", "dataset"))
    require_checksum(archive, checksum, what)
    part = downloads / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tarfile.open(archive) as content:
            # The filter refuses absolute paths, links to outside and device files.
            content.extractall(part, filter="data")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{archive} cannot be unpacked: {error}", hint="remove it and fetch again"
        ) from error
    if not (part / name).is_dir():
        raise DataError(f"{archive}: expected a folder {name!r} inside, got none")
    target = root / "dataset" / name
    if target.exists():
        shutil.copytree(part / name, target, dirs_exist_ok=True)
    else:
        (part / name).rename(target)
    shutil.rmtree(part, ignore_errors=True)
    archive.unlink()
