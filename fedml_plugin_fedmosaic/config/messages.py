"""pydantic's findings in the words of a configuration file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedml_plugin_fedmosaic.config.yamlfile import Document, KeyPath

_TEXT: Mapping[str, str] = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "dataclass_type": "must be a mapping",
    "dataclass_exact_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "greater_than_equal": "must be >= {ge:g}",
    "greater_than": "must be > {gt:g}",
    "less_than_equal": "must be <= {le:g}",
    "less_than": "must be < {lt:g}",
    "literal_error": "must be one of {expected}",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, ignoring case; None if none is alike."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """``unknown key; did you mean 'rank'?`` or the list of known names."""
    known = sorted(known)
    near = nearest(name, known)
    if near is not None:
        return f"unknown {kind}; did you mean {near!r}?"
    return f"unknown {kind}; known: {', '.join(known) or 'none'}"


def shown(value: Any) -> str:
    """A value as the user wrote it, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _describe(error: Mapping[str, Any], known: Iterable[str]) -> str:
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        return unknown("key", str(error["loc"][-1]), known)
    if kind in {"missing", "missing_argument", "missing_keyword_only_argument"}:
        return "is required"
    if kind == "value_error":
        return str(context["error"])
    text = _TEXT[kind].format(**context) if kind in _TEXT else str(error["msg"])
    if kind == "literal_error" and isinstance(value, str):
        choices = [part.strip(" '") for part in context["expected"].replace(" or ", ",").split(",")]
        near = nearest(value, choices)
        if near is not None:
            text += f"; did you mean {near!r}?"
    return f"{text} (got {shown(value)})"


def validate(
    adapter: TypeAdapter[Any],
    raw: Any,
    document: Document,
    path: KeyPath,
    known: Iterable[str] = (),
) -> Any:
    """Validates one section strictly (no text for numbers, no numbers for booleans).

    Args:
        adapter: the section's type.
        raw: plain YAML data.
        document: takes the problems.
        path: the section's key path in the file.
        known: field names, for the nearest name of an unknown key.

    Returns:
        The section, or None if there was a problem.
    """
    try:
        # JSON mode: strict about types, but a YAML list may fill a tuple.
        return adapter.validate_json(json.dumps(raw), strict=True)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            location = tuple(part for part in error["loc"] if part != "[key]")
            document.report((*path, *location), _describe({**error}, known))
        return None
