"""Shelves: lazy, without duplicates, helpful about unknown names."""

from __future__ import annotations

import pytest

from fedml_plugin_fedmosaic.core.errors import RegistryError
from fedml_plugin_fedmosaic.core.registry import (
    ADAPTERS,
    COMMUNICATORS,
    DATASETS,
    LAUNCHERS,
    SOURCES,
    STRATEGIES,
    Registry,
)

SHELVES = [STRATEGIES, ADAPTERS, DATASETS, SOURCES, COMMUNICATORS, LAUNCHERS]


def test_a_member_is_imported_on_first_use_only() -> None:
    shelf = Registry("things", {"good": "json:dumps", "broken": "no_such_module:thing"})
    assert "broken" in shelf
    assert shelf["good"]([1]) == "[1]"
    with pytest.raises(ModuleNotFoundError):
        shelf["broken"]


def test_a_name_is_taken_once() -> None:
    shelf = Registry("things", {"one": "json:dumps"})
    shelf.register("one", "json:dumps")
    with pytest.raises(RegistryError, match="already registered as 'json:dumps'"):
        shelf.register("one", "json:loads")
    with pytest.raises(RegistryError, match="not 'module:attribute'"):
        shelf.register("two", "json.loads")
    assert list(shelf) == ["one"]


def test_an_unknown_name_gets_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(RegistryError) as caught:
        STRATEGIES["fedmosiac"]
    assert f"known: {', '.join(sorted(STRATEGIES))}" in caught.value.message
    assert {"fedavg", "fedmosaic", "local"} <= set(STRATEGIES)
    assert caught.value.hint == "did you mean 'fedmosaic'?"
    with pytest.raises(RegistryError) as caught:
        STRATEGIES["xyz"]
    assert caught.value.hint is None


@pytest.mark.parametrize("shelf", SHELVES, ids=lambda shelf: shelf.shelf)
def test_every_builtin_member_exists(shelf: Registry) -> None:
    assert len(shelf) >= 2
    for name in shelf:
        assert callable(shelf[name]), name
        assert name == name.lower()


def test_entry_points_of_third_parties_are_members(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    groups = []

    def fake(*, group: str) -> list[EntryPoint]:
        groups.append(group)
        return [EntryPoint("theirs", "json:loads", group)]

    monkeypatch.setattr("fedml_plugin_fedmosaic.core.registry.entry_points", fake)
    shelf = Registry("things", {"ours": "json:dumps"})
    assert list(shelf) == ["ours", "theirs"]
    assert shelf["theirs"]("[1]") == [1]
    assert groups == ["fedml_plugin_fedmosaic.things"]
