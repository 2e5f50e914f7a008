"""``--set section.key=value``: changes of single keys from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedml_plugin_fedmosaic.config.fedml_keys import IGNORED
from fedml_plugin_fedmosaic.config.layout import FIELD_OF_SECTION, homes_of, keys_of
from fedml_plugin_fedmosaic.config.messages import nearest, unknown
from fedml_plugin_fedmosaic.config.sections import SECTION_OF
from fedml_plugin_fedmosaic.config.yamlfile import (
    Document,
    KeyPath,
    Problem,
    as_mapping,
    parse_value,
)
from fedml_plugin_fedmosaic.core.errors import ConfigError

_EXAMPLE = "write --set section.key=value, for example --set train_args.comm_round=2"
_ALIASES = {"algo": "train_args.federated_optimizer", "seed": "common_args.random_seed"}
"""Short names of two keys that are changed all the time."""


def _all_keys() -> Iterator[str]:
    for field in SECTION_OF:
        if field != "models":
            yield from keys_of(field)


def _from_bare_key(key: str) -> KeyPath:
    homes = (_ALIASES[key],) if key in _ALIASES else homes_of(key)
    if len(homes) == 1:
        return tuple(homes[0].split("."))
    if homes:
        raise ConfigError(f"{key!r} exists in several sections; name one of {', '.join(homes)}")
    near = nearest(key, _all_keys())
    raise ConfigError(
        f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else f"; {_EXAMPLE}")
    )


def resolve_key(text: str) -> KeyPath:
    """The full path of a key in any of its accepted spellings.

    ``optim_args.optim.batch_size``, ``optim_args.batch_size``, ``optim.batch_size`` and, where it
    exists in one section only, the bare key; ``seed`` and ``algo`` for the random seed and the
    strategy.

    Raises:
        ConfigError: no such section or key, or a bare key of several sections.
    """
    first, *rest = text.split(".")
    if not all([first, *rest]):
        raise ConfigError(f"{text!r} has an empty part; {_EXAMPLE}")
    inner_names = {inner: name for name, (_, inner) in SECTION_OF.items() if inner}
    field = FIELD_OF_SECTION.get(first)
    if field is None:
        field = first if first in SECTION_OF else inner_names.get(first)
    elif rest and rest[0] in IGNORED.get(first, ()):
        return (first, *rest)
    elif rest and rest[0] == SECTION_OF[field][1]:
        rest = rest[1:]
    if field is None:
        if first in IGNORED:
            return (first, *rest)
        if rest:
            raise ConfigError(unknown("section", first, [*FIELD_OF_SECTION, *SECTION_OF]))
        return _from_bare_key(first)
    section, inner = SECTION_OF[field]
    if not rest and inner is None:
        raise ConfigError(f"{text!r} is a section; {_EXAMPLE}")
    return (section, *([inner] if inner else []), *rest)


def _set(document: Document, path: KeyPath, value: object, origin: str) -> None:
    target = document.data
    for depth, part in enumerate(path[:-1], start=1):
        child = target.get(str(part))
        if child is None:
            child = {}
            target[str(part)] = child
            document.origins[path[:depth]] = origin
        mapping = as_mapping(child)
        if mapping is None:
            document.problems.append(
                Problem(origin, "", f"{'.'.join(map(str, path[:depth]))} is not a mapping")
            )
            return
        target = child
    for known in [known for known in document.origins if known[: len(path)] == path]:
        del document.origins[known]
    document.origins[path] = origin
    target[str(path[-1])] = value


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Writes each ``key=value`` into the document, later ones over earlier ones.

    Mistakes are noted in the document's ``problems`` with the option as their origin.
    """
    for text in overrides:
        origin = f"--set {text}"
        key, equals, raw = text.partition("=")
        try:
            if not equals:
                raise ConfigError(f"there is no '='; {_EXAMPLE}")
            _set(document, resolve_key(key.strip()), parse_value(raw), origin)
        except ConfigError as error:
            document.problems.append(Problem(origin, "", error.message))
