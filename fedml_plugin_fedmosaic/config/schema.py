"""JSON schema and Markdown reference of configuration files, made from the typed sections.

The texts are the strings under the fields, so that there is one place to write them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from fedml_plugin_fedmosaic.config.fedml_keys import IGNORED, REFUSED, REPLACED
from fedml_plugin_fedmosaic.config.layout import section_types
from fedml_plugin_fedmosaic.config.sections import SECTION_OF, Experiment, ModelSpec
from fedml_plugin_fedmosaic.core.registry import STRATEGIES

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Field name -> the text under the field in the source of the class or of one it extends."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for here, below in pairwise(body):
        if not isinstance(here, ast.AnnAssign) or not isinstance(here.target, ast.Name):
            continue
        value = below.value if isinstance(below, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docs[here.target.id] = " ".join(value.value.split())
    return docs


def _describe(schema: dict[str, Any], cls: type) -> dict[str, Any]:
    """The schema of one class with the texts of its fields and without pydantic's titles."""
    for name, text in field_docs(cls).items():
        if name in schema.get("properties", {}):
            schema["properties"][name].pop("title", None)
            schema["properties"][name]["description"] = text
    schema.pop("title", None)
    schema["description"] = (inspect.getdoc(cls) or "").split("\n")[0]
    return schema


def _schema_of(field: str) -> dict[str, Any]:
    if field == "models":
        entry = _describe(TypeAdapter(ModelSpec).json_schema(), ModelSpec)
        return {"type": "object", "additionalProperties": entry}
    if field == "strategy":
        options = [
            _describe(TypeAdapter(STRATEGIES[name].Options).json_schema(), STRATEGIES[name].Options)
            for name in STRATEGIES
        ]
        return {"type": "object", "anyOf": options}
    target = section_types()[field]
    return _describe(TypeAdapter(target).json_schema(), target)


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a whole configuration file."""
    sections: dict[str, Any] = {}
    for field, (section, inner) in SECTION_OF.items():
        body = _schema_of(field)
        if inner is not None:
            body = {"type": "object", "properties": {inner: body}, "additionalProperties": False}
        for key in sorted(IGNORED.get(section, ())):
            body["properties"].setdefault(key, {"description": "FedML's; not used by this run"})
        sections[section] = body
    for section in IGNORED:
        sections.setdefault(section, {"type": "object", "description": "FedML's; not used"})
    return {
        "$schema": _DRAFT,
        "title": "Configuration of fedml-plugin-fedmosaic",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
    }


def _type_text(schema: Mapping[str, Any]) -> str:
    """A JSON schema's type in a few words."""
    if "anyOf" in schema:
        return " or ".join(
            dict.fromkeys(_type_text(s) for s in schema["anyOf"] if s.get("type") != "null")
        )
    if "enum" in schema:
        return " \\| ".join(f"`{_yaml(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_yaml(schema['const'])}`"
    if schema.get("type") == "array":
        return f"list of {_type_text(schema.get('items', {}))}"
    names = {"integer": "whole number", "string": "text", "boolean": "true or false"}
    text = names.get(schema.get("type", ""), schema.get("type", "any"))
    bounds = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
    }
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return f"{text} {' and '.join(limits)}".rstrip()


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def option_rows(cls: Any) -> Iterator[str]:
    """A table of a section's keys, line by line."""
    schema = TypeAdapter(cls).json_schema()
    docs = field_docs(cls)
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for item in dataclasses.fields(cls):
        prop = schema["properties"][item.name]
        required = item.name in schema.get("required", ())
        if required:
            default = "required"
        elif prop.get("default") is None:
            default = "-"
        else:
            default = f"`{_yaml(prop['default'])}`"
        text = docs.get(item.name, "").replace("``", "`")
        yield f"| `{item.name}` | {_type_text(prop)} | {default} | {text} |"


def _intro() -> str:
    return """\
# Configuration

<!-- Made by `fedmosaic config reference`; edit the texts in config/sections.py. -->

A configuration is FedML's YAML: FedML's own sections hold flat keys, and each section of ours
holds exactly one mapping. A file names only what differs from the defaults; unknown keys, wrong
types and keys written twice are errors. Values come from the defaults, then the file, then
`--algo` and `--backend`, then `--set key=value`. Paths in a file are relative to the file's
folder, paths given to `--set` to the current one.

`fedmosaic config show` prints a complete file, `fedmosaic config check --cf FILE` reports every
mistake at once, and `fedmosaic config schema` prints a JSON schema for your editor.
"""


def reference_markdown() -> str:
    """Every key with type, default and meaning, as a Markdown page."""
    docs = field_docs(Experiment)
    parts = [_intro()]
    for field, (section, inner) in SECTION_OF.items():
        if field == "strategy":
            parts.append(_strategy_part(section, str(inner)))
            continue
        target = ModelSpec if field == "models" else section_types()[field]
        title = section if inner is None else f"{section}: {inner}"
        path = f"{inner}.NAME" if field == "models" else inner
        where = f"Keys of `{section}`" + (f" / `{path}`." if path else ", flat as in FedML.")
        lead = docs.get(field, "")
        lines = [f"## {title}\n", f"{where} {lead}".rstrip(), "", *option_rows(target)]
        parts.append("\n".join(lines))
    parts.append(_fedml_part())
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _strategy_part(section: str, inner: str) -> str:
    lines = [
        f"## {section}: {inner}\n",
        f"Keys of `{section}` / `{inner}` depend on `train_args.federated_optimizer`.",
    ]
    for name in STRATEGIES:
        options = STRATEGIES[name].Options
        lines += [f"\n### {name}\n"]
        lines += list(option_rows(options)) if dataclasses.fields(options) else ["No options."]
    return "\n".join(lines)


def _fedml_part() -> str:
    lines = [
        "## FedML keys that are not used\n",
        "A FedML main may need these keys in the same file; a FedMosaic run accepts and ignores "
        "them.\n",
        "| section | keys |",
        "|---|---|",
    ]
    for section, keys in IGNORED.items():
        lines.append(f"| `{section}` | {', '.join(f'`{key}`' for key in sorted(keys))} |")
    lines += ["\nOurs in their place:\n", "| FedML | here |", "|---|---|"]
    lines += [f"| `{'.'.join(path)}` | `{ours}` |" for path, ours in REPLACED.items()]
    lines += ["\nSwitches that must be false:\n", "| key | why |", "|---|---|"]
    lines += [f"| `{key}` | {why} |" for key, why in REFUSED.items()]
    return "\n".join(lines)
