"""Which settings a checkpoint depends on, and where two experiments differ in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from fedml_plugin_fedmosaic.config.sections import SECTION_OF, Experiment

_FREE_SECTIONS = ("comm", "run", "tracking")
_FREE_KEYS = {
    "device": ("num_threads", "gpu_id"),
    "train": ("comm_round",),
    "common": ("config_version", "scenario"),
}
_FREE_MODEL_KEYS = ("ranks",)


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, (*path, str(key)))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _is_free(field: str, path: tuple[str, ...]) -> bool:
    if field in _FREE_SECTIONS or path[-1] in _FREE_KEYS.get(field, ()):
        return True
    return field == "models" and path[-1] in _FREE_MODEL_KEYS


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """Full key path -> value of every setting that changes results.

    Left out is what a resumed run may change: backend and ranks, threads, where results go and
    how often they are saved, and the number of rounds, which is checked on its own.
    """
    found: dict[str, Any] = {}
    for field, (section, inner) in SECTION_OF.items():
        start = tuple(part for part in (section, inner) if part)
        for path, value in _flat(getattr(experiment, field), start):
            # A file need not say what is not set.
            if value is not None and not _is_free(field, path):
                found[".".join(path)] = value
    found["train_args.federated_optimizer"] = experiment.algo
    return found


def differences(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """Key path -> (old, new) of every setting that changes results and differs; None: not set."""
    before, after = settings_of(old), settings_of(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    }
