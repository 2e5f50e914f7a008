"""Schema and reference are complete and never out of date."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.config.layout import section_types
from fedml_plugin_fedmosaic.config.schema import field_docs, json_schema, reference_markdown
from fedml_plugin_fedmosaic.config.sections import SECTION_OF, ModelSpec
from fedml_plugin_fedmosaic.core.registry import STRATEGIES

CLASSES = [
    ModelSpec,
    *(cls for name, cls in section_types().items() if name not in ("models", "strategy")),
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_is_explained(cls: type) -> None:
    docs = field_docs(cls)
    missing = [item.name for item in dataclasses.fields(cls) if not docs.get(item.name)]
    assert missing == []


def test_every_strategy_option_is_explained() -> None:
    for name in STRATEGIES:
        options = STRATEGIES[name].Options
        names = {item.name for item in dataclasses.fields(options)}
        assert set(field_docs(options)) >= names, name


def test_the_schema_has_every_section_and_key() -> None:
    properties = json_schema()["properties"]
    for field, (section, inner) in SECTION_OF.items():
        body = properties[section]
        if inner is not None:
            body = body["properties"][inner]
        if field not in ("models", "strategy"):
            names = {item.name for item in dataclasses.fields(section_types()[field])}
            assert names <= set(body["properties"]), section
    rank = properties["adapter_args"]["properties"]["adapter"]["properties"]["rank"]
    assert (rank["minimum"], rank["default"]) == (1, 16)
    assert rank["description"] == "LoRA rank r."


def test_the_reference_lists_every_key() -> None:
    text = reference_markdown()
    for cls in CLASSES:
        for item in dataclasses.fields(cls):
            assert f"| `{item.name}` |" in text
    assert "### fedmosaic" in text
    assert "| `path` | text | required |" in text
    assert "| `rank` | whole number >= 1 | `16` | LoRA rank r. |" in text


def test_the_page_in_the_documentation_is_the_reference() -> None:
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference_markdown(), (
        "run: fedmosaic config reference > docs/configuration.md"
    )
