"""Shelves of named parts: name -> lazy ``"module:attribute"``.

Adding an algorithm, adapter, data set or transport is one new file and one line in a table below.
Third parties register through entry points ``fedml_plugin_fedmosaic.<shelf>``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fedml_plugin_fedmosaic.core.errors import RegistryError

_ROOT = "fedml_plugin_fedmosaic"


class Registry(Mapping[str, Any]):
    """A read-mostly map from a name to an object that is imported on first use.

    Args:
        shelf: plural name of the shelf, also the suffix of the entry-point group.
        builtin: names of our own members, each with its lazy ``"module:attribute"``.
    """

    def __init__(self, shelf: str, builtin: Mapping[str, str]) -> None:
        self.shelf = shelf
        self._targets: dict[str, str] = dict(builtin)
        self._entry_points_read = False

    def register(self, name: str, target: str) -> None:
        """Adds a member.

        Args:
            name: lower-case name used in configuration files.
            target: ``"module:attribute"``; nothing is imported yet.

        Raises:
            RegistryError: the name is taken by another target, or the target has no colon.
        """
        if ":" not in target:
            raise RegistryError(
                f"{self.shelf}: target {target!r} of {name!r} is not 'module:attribute'"
            )
        known = self._targets.get(name)
        if known is not None and known != target:
            raise RegistryError(f"{self.shelf}: {name!r} is already registered as {known!r}")
        self._targets[name] = target

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        for point in entry_points(group=f"{_ROOT}.{self.shelf}"):
            self.register(point.name, point.value)

    def __getitem__(self, name: str) -> Any:
        """The member called ``name``, imported now if needed.

        Raises:
            RegistryError: unknown name (the known names and the nearest one are listed).
        """
        self._read_entry_points()
        target = self._targets.get(name)
        if target is None:
            near = difflib.get_close_matches(name, self._targets, n=1)
            hint = f"did you mean {near[0]!r}?" if near else None
            raise RegistryError(
                f"unknown name {name!r} in {self.shelf}; known: {', '.join(sorted(self._targets))}",
                hint=hint,
            )
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        self._read_entry_points()
        return iter(sorted(self._targets))

    def __len__(self) -> int:
        self._read_entry_points()
        return len(self._targets)

    def __contains__(self, name: object) -> bool:
        self._read_entry_points()
        return name in self._targets


STRATEGIES = Registry(
    "strategies",
    {
        "ditto": f"{_ROOT}.strategies.ditto:Ditto",
        "factorized": f"{_ROOT}.strategies.factorized:Factorized",
        "fedavg": f"{_ROOT}.strategies.fedavg:FedAvg",
        "feddat": f"{_ROOT}.strategies.feddat:FedDAT",
        "feddistill": f"{_ROOT}.strategies.feddistill:FedDistill",
        "feddpa": f"{_ROOT}.strategies.feddpa:FedDPA",
        "fedmkt": f"{_ROOT}.strategies.fedmkt:FedMKT",
        "fedmosaic": f"{_ROOT}.strategies.fedmosaic:FedMosaic",
        "fedrema": f"{_ROOT}.strategies.fedrema:FedReMa",
        "fedsim": f"{_ROOT}.strategies.fedsim:FedSim",
        "fesem": f"{_ROOT}.strategies.fesem:FeSEM",
        "ifca": f"{_ROOT}.strategies.ifca:IFCA",
        "knn_fedavg": f"{_ROOT}.strategies.knn_per:KnnFedAvg",
        "knn_fedmosaic": f"{_ROOT}.strategies.knn_per:KnnFedMosaic",
        "local": f"{_ROOT}.strategies.local:Local",
        "per_fedavg": f"{_ROOT}.strategies.per_fedavg:PerFedAvg",
        "perada": f"{_ROOT}.strategies.perada:PerAda",
        "pfedla": f"{_ROOT}.strategies.pfedla:PFedLA",
        "takfl": f"{_ROOT}.strategies.takfl:TAKFL",
        "tap": f"{_ROOT}.strategies.tap:Tap",
    },
)
ADAPTERS = Registry(
    "adapters",
    {
        "dual_lora": f"{_ROOT}.adapters.dual_lora:inject_dual_lora",
        "lora": f"{_ROOT}.adapters.lora:inject_lora",
        "pq_lora": f"{_ROOT}.adapters.pq_lora:inject_pq_lora",
    },
)
DATASETS = Registry(
    "datasets",
    {
        "drake": f"{_ROOT}.data.drake:load_drake",
        "drake-lite": f"{_ROOT}.data.lite:load_lite",
        "folder": f"{_ROOT}.data.drake:load_drake",
        "hflb": f"{_ROOT}.data.drake:load_drake",
        "quickstart": f"{_ROOT}.data.quickstart:load_quickstart",
        "text": f"{_ROOT}.data.text_tasks:load_text",
    },
)
SOURCES = Registry(
    "sources",
    {
        "drake": f"{_ROOT}.data.sources:DrakeSource",
        "drake-lite": f"{_ROOT}.data.lite:LiteSource",
        "folder": f"{_ROOT}.data.sources:FolderSource",
        "hflb": f"{_ROOT}.data.sources:HflbSource",
        "quickstart": f"{_ROOT}.data.sources:QuickstartSource",
        "text": f"{_ROOT}.data.text_tasks:TextSource",
    },
)
EXAMS = Registry(
    "exams",
    {
        "gsm8k": f"{_ROOT}.engine.exams:Gsm8k",
        "mmlu": f"{_ROOT}.engine.exams:Mmlu",
    },
)
METRICS = Registry(
    "metrics",
    {
        "Bleu-1": f"{_ROOT}.data.text_metrics:bleu_1",
        "Bleu-2": f"{_ROOT}.data.text_metrics:bleu_2",
        "Bleu-3": f"{_ROOT}.data.text_metrics:bleu_3",
        "Bleu-4": f"{_ROOT}.data.text_metrics:bleu",
        "CIDEr": f"{_ROOT}.data.text_metrics:cider",
        "METEOR": f"{_ROOT}.data.text_metrics:meteor",
        "METEOR-stem": f"{_ROOT}.data.text_metrics:meteor_stem",
        "RougeL": f"{_ROOT}.data.text_metrics:rouge_l",
    },
)
COMMUNICATORS = Registry(
    "communicators",
    {
        "local": f"{_ROOT}.comm.local:LocalCommunicator",
        "mpi": f"{_ROOT}.comm.mpi:MPICommunicator",
    },
)
LAUNCHERS = Registry(
    "launchers",
    {
        "debug": f"{_ROOT}.launch.debug:DebugLauncher",
        "local": f"{_ROOT}.launch.local:LocalLauncher",
        "slurm": f"{_ROOT}.launch.slurm:SlurmLauncher",
    },
)
