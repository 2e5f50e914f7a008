"""Which key belongs where: derived from the typed sections, never written twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from fedml_plugin_fedmosaic.config.sections import SECTION_OF, Experiment, ModelSpec

FIELD_OF_SECTION: Mapping[str, str] = {section: name for name, (section, _) in SECTION_OF.items()}
"""YAML section -> field of :class:`Experiment`."""


@cache
def section_types() -> Mapping[str, Any]:
    """Field of :class:`Experiment` -> its type."""
    hints = get_type_hints(Experiment)
    return {name: hints[name] for name in SECTION_OF}


@cache
def adapter_for(field: str) -> TypeAdapter[Any]:
    """The validator of one field of :class:`Experiment`."""
    return TypeAdapter(section_types()[field])


def keys_of(field: str) -> tuple[str, ...]:
    """Names of the keys of one field; of one entry, for ``models``; none for ``strategy``."""
    if field == "strategy":
        return ()
    target = ModelSpec if field == "models" else section_types()[field]
    return tuple(item.name for item in dataclasses.fields(target))


@cache
def homes_of(key: str) -> tuple[str, ...]:
    """Full key paths of every place where a key called ``key`` exists (models excluded)."""
    homes = []
    for field, (section, inner) in SECTION_OF.items():
        if field != "models" and key in keys_of(field):
            homes.append(".".join(part for part in (section, inner, key) if part))
    return tuple(homes)
