"""From a YAML file and command-line changes to a validated :class:`Experiment`, and back.

Precedence: defaults < YAML < ``--algo``/``--backend`` < ``--set``. All mistakes are reported at
once, one per line, as ``file.yaml:12: adapter_args.adapter.rank: must be >= 1 (got -4)``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedml_plugin_fedmosaic.config.fedml_keys import IGNORED, REFUSED, REPLACED
from fedml_plugin_fedmosaic.config.layout import (
    FIELD_OF_SECTION,
    adapter_for,
    homes_of,
    keys_of,
)
from fedml_plugin_fedmosaic.config.messages import nearest, shown, unknown, validate
from fedml_plugin_fedmosaic.config.overrides import apply_overrides
from fedml_plugin_fedmosaic.config.sections import SECTION_OF, Experiment
from fedml_plugin_fedmosaic.config.yamlfile import (
    Document,
    KeyPath,
    as_mapping,
    read_document,
    to_yaml,
)
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import ADAPTERS, DATASETS, STRATEGIES

LOG = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
_BACKENDS = {"sp": "sp", "mpi": "MPI"}


def bundled_folders() -> tuple[Path, ...]:
    """Where the configurations are that come with the package: checkout or installation."""
    checkout = _PACKAGE.parent
    in_checkout = (checkout / "pyproject.toml").is_file()
    return (checkout / "configs",) if in_checkout else (_PACKAGE / "_configs",)


def bundled_config(name: str = "quickstart") -> Path:
    """Path of a configuration that comes with the package.

    Raises:
        ConfigError: there is none of that name; the known ones are listed.
    """
    folders = bundled_folders()
    for folder in folders:
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(f"no bundled configuration {name!r}; known: {', '.join(known) or 'none'}")


def load_experiment(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    algo: str | None = None,
    backend: str | None = None,
) -> Experiment:
    """Loads and checks a configuration.

    Args:
        path: YAML file; the bundled quickstart when None.
        overrides: ``section.key=value`` texts, as given to ``--set``.
        algo: strategy name that replaces ``train_args.federated_optimizer``. The file's own
            ``strategy_args`` belong to the file's strategy and are dropped if it is another one.
        backend: ``sp`` or ``MPI``, replaces ``comm_args.backend``.

    Returns:
        The frozen experiment; relative paths of the file are absolute.

    Raises:
        ConfigError: the file, a key, a value or an option is wrong; every mistake is listed.
    """
    file = bundled_config() if path is None else Path(path)
    document = read_document(file)
    _apply_options(document, algo, backend)
    apply_overrides(document, overrides)
    raw = _collect(document)
    sections = {
        name: validate(adapter_for(name), value, document, _path_of(name), keys_of(name))
        for name, value in raw.items()
    }
    failed = frozenset(name for name, value in sections.items() if value is None)
    experiment = Experiment(**{name: sections[name] for name in sections if name not in failed})
    _check_names(document, experiment)
    _check_relations(document, experiment, failed)
    _check_strategy(document, experiment, raw)
    document.raise_problems()
    return _resolve_paths(document, experiment, file.resolve().parent)


def dump_experiment(experiment: Experiment) -> str:
    """The experiment as YAML in the same sections; loading it gives an equal experiment."""
    plain = TypeAdapter(Experiment).dump_python(experiment, mode="json")
    tree: dict[str, Any] = {}
    for name, (section, inner) in SECTION_OF.items():
        values = plain[name]
        if name != "strategy":
            values = _without_nulls(values)
        if not values:
            continue
        tree[section] = {inner: values} if inner else values
    return to_yaml(tree)


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _path_of(field: str, *keys: str) -> KeyPath:
    section, inner = SECTION_OF[field]
    return (section, *([inner] if inner else []), *keys)


def _apply_options(document: Document, algo: str | None, backend: str | None) -> None:
    for option, value, path in (
        ("--algo", algo, _path_of("train", "federated_optimizer")),
        ("--backend", backend, _path_of("comm", "backend")),
    ):
        if value is None:
            continue
        section = document.data.setdefault(str(path[0]), {})
        if as_mapping(section) is None:
            continue
        if option == "--algo":
            _drop_foreign_options(document, str(section.get(path[1], "FedMosaic")), value)
        section[str(path[1])] = value if option == "--algo" else _BACKENDS.get(value.lower(), value)
        document.origins[path] = f"{option} {value}"


def _drop_foreign_options(document: Document, written: str, algo: str) -> None:
    section, inner = SECTION_OF["strategy"]
    if written.lower() == algo.lower() or section not in document.data:
        return
    options = as_mapping(document.data[section])
    if options is not None and options.get(str(inner)):
        LOG.info(
            "%s: %s belongs to %s; not used with --algo %s", document.name, section, written, algo
        )
        del document.data[section]


def _collect(document: Document) -> dict[str, Any]:
    """The raw value of every field that the file sets; notes what does not belong."""
    raw: dict[str, Any] = {}
    for section, content in document.data.items():
        if section not in FIELD_OF_SECTION and section not in IGNORED:
            document.report((section,), _unknown_section(section))
            continue
        values = as_mapping(content)
        if values is None:
            empty = content is None
            text = "is empty; give it keys or remove it" if empty else "must be a mapping"
            document.report((section,), f"the section {text}")
            continue
        if not values:
            document.report((section,), "the section is empty; give it keys or remove it")
        field = FIELD_OF_SECTION.get(section)
        inner = SECTION_OF[field][1] if field else None
        if field is None or inner is None:
            flat = {key: value for key, value in values.items() if _is_ours(document, section, key)}
            if field is not None:
                raw[field] = flat
            continue
        _collect_inner(document, section, field, values, raw)
    return raw


def _collect_inner(
    document: Document, section: str, field: str, values: Mapping[str, Any], raw: dict[str, Any]
) -> None:
    inner = SECTION_OF[field][1]
    for key, value in values.items():
        path = (section, key)
        if key == inner:
            if value is None:
                document.report(path, "is empty; give it keys or remove it")
            else:
                raw[field] = value
        elif _is_switch_or_ignored(document, section, key):
            continue
        elif key in keys_of(field) and field != "models":
            document.report(path, f"belongs one level deeper, into {section}.{inner}.{key}")
        elif nearest(key, [str(inner)]):
            document.report(path, f"unknown key; did you mean {inner!r}?")
        else:
            document.report(
                path, f"unknown key; {section} holds one mapping called {inner!r}{_home_hint(key)}"
            )


def _is_switch_or_ignored(document: Document, section: str, key: str) -> bool:
    """Whether a key is FedML's and needs no further look; refuses switches that are on."""
    if key in REFUSED:
        value = document.data[section][key]
        if value is True:
            document.report((section, key), f"must be false: {REFUSED[key]}")
        elif value is not False:
            document.report((section, key), f"must be true or false (got {shown(value)})")
        return True
    if key not in IGNORED.get(section, ()):
        return False
    if (section, key) in REPLACED:
        LOG.warning(
            "%s: %s.%s is FedML's and not used by this run; ours is %s",
            document.origin((section, key)),
            section,
            key,
            REPLACED[section, key],
        )
    return True


def _is_ours(document: Document, section: str, key: str) -> bool:
    """Whether a key of a flat section goes into our typed section."""
    field = FIELD_OF_SECTION.get(section)
    if _is_switch_or_ignored(document, section, key):
        return False
    if field is not None and key in keys_of(field):
        return True
    known = {*(keys_of(field) if field else ()), *IGNORED.get(section, ())}
    text = unknown("key", key, known)
    document.report((section, key), text if nearest(key, known) else text + _home_hint(key))
    return False


def _home_hint(key: str) -> str:
    homes = homes_of(key)
    return f"; there is {' and '.join(homes)}" if homes else ""


def _unknown_section(section: str) -> str:
    for name, (home, inner) in SECTION_OF.items():
        if section in (name, inner):
            return f"unknown section; did you mean {'.'.join(filter(None, (home, inner)))!r}?"
    homes = homes_of(section)
    if homes:
        return f"is not a section; there is {' and '.join(homes)}"
    # Without the common ending, which would make all names look alike.
    stems = {name.removesuffix("_args"): name for name in (*FIELD_OF_SECTION, *IGNORED)}
    near = nearest(section.removesuffix("args").rstrip("_"), stems)
    if near is not None:
        return f"unknown section; did you mean {stems[near]!r}?"
    return f"unknown section; known: {', '.join(stems.values())}"


def _check_names(document: Document, experiment: Experiment) -> None:
    checks: list[tuple[str, str, KeyPath, Any]] = [
        ("data set", experiment.data.source, _path_of("data", "source"), DATASETS),
    ]
    if experiment.adapter.type != "auto":
        checks.append(("adapter", experiment.adapter.type, _path_of("adapter", "type"), ADAPTERS))
    for index, name in enumerate(experiment.evaluation.compare):
        path = (*_path_of("evaluation", "compare"), index)
        checks.append(("strategy", name, path, STRATEGIES))
    for kind, name, path, shelf in checks:
        if name not in shelf:
            known = ", ".join(shelf)
            near = nearest(name, shelf)
            hint = f"; did you mean {near!r}?" if near else ""
            document.report(path, f"unknown {kind} {name!r}; known: {known}{hint}")


def _check_relations(document: Document, experiment: Experiment, failed: frozenset[str]) -> None:
    train, models = experiment.train, experiment.models
    total, drawn = train.client_num_in_total, train.client_num_per_round
    if total is not None and drawn is not None and drawn > total:
        document.report(
            _path_of("train", "client_num_per_round"),
            f"must be <= client_num_in_total ({total}) (got {drawn})",
        )
    for field, key in (("sketch", "proxy"), ("adapter", "anchor")):
        name = getattr(getattr(experiment, field), key)
        if name is not None and name not in models and "models" not in failed:
            text = f"no model {name!r} in model_args.models; defined: {', '.join(models) or 'none'}"
            document.report(_path_of(field, key), text)
    for field, key in (("data", "root"), ("data", "scenario"), ("adapter", "alignment")):
        if getattr(getattr(experiment, field), key) == "":
            document.report(_path_of(field, key), "must not be empty")
    for name, spec in models.items():
        if not spec.path:
            document.report(_path_of("models", name, "path"), "must not be empty")
    data = experiment.data
    if data.split == "static" and data.rounds_per_task is not None:
        whole = data.rounds_per_task.is_integer()
        if not whole:
            text = f"must be a whole number with split: static (got {data.rounds_per_task})"
            document.report(_path_of("data", "rounds_per_task"), text)


def _check_strategy(document: Document, experiment: Experiment, raw: Mapping[str, Any]) -> None:
    """Checks the strategy's name and its options (also where the rest of its section is wrong)."""
    fallback = experiment.train.federated_optimizer
    written = (as_mapping(raw.get("train")) or {}).get("federated_optimizer", fallback)
    if not isinstance(written, str):
        return
    if written.lower() not in STRATEGIES:
        near = nearest(written, STRATEGIES)
        hint = f"; did you mean {near!r}?" if near else ""
        document.report(
            _path_of("train", "federated_optimizer"),
            f"unknown strategy {written!r}; known: {', '.join(STRATEGIES)}{hint}",
        )
        return
    options_type = STRATEGIES[written.lower()].Options
    known = [field.name for field in dataclasses.fields(options_type)]
    options = dict(experiment.strategy)
    validate(TypeAdapter(options_type), options, document, _path_of("strategy"), known)


def _resolve_paths(document: Document, experiment: Experiment, folder: Path) -> Experiment:
    """Makes the file's relative paths absolute; those of ``--set`` start from here."""

    def base(path: KeyPath) -> Path:
        return Path.cwd() if document.origin(path).startswith("--set") else folder

    def absolute(path: KeyPath, value: str) -> str:
        try:
            expanded = Path(value).expanduser()
        except RuntimeError:  # "~name" of a user that does not exist is a plain name
            expanded = Path(value)
        return str((base(path) / expanded).absolute())

    data, adapter = experiment.data, experiment.adapter
    if data.root is not None:
        data = replace(data, root=absolute(_path_of("data", "root"), data.root))
    if data.scenario is not None:
        resolved = absolute(_path_of("data", "scenario"), data.scenario)
        is_path = data.scenario.endswith(".json") or "/" in data.scenario
        if is_path or Path(resolved).is_file():
            data = replace(data, scenario=resolved)
    if adapter.alignment not in (None, "bundled"):
        resolved = absolute(_path_of("adapter", "alignment"), str(adapter.alignment))
        adapter = replace(adapter, alignment=resolved)
    engine = experiment.engine
    if engine.deepspeed is not None:
        resolved = absolute(_path_of("engine", "deepspeed"), engine.deepspeed)
        engine = replace(engine, deepspeed=resolved)
    models = {}
    for name, spec in experiment.models.items():
        resolved = absolute(_path_of("models", name, "path"), spec.path)
        # A hub id ("org/name") looks like a relative path; only an existing folder is one.
        local = ":" not in spec.path and Path(resolved).is_dir()
        models[name] = replace(spec, path=resolved) if local else spec
    return replace(experiment, data=data, adapter=adapter, engine=engine, models=models)


__all__ = ["bundled_config", "dump_experiment", "load_experiment"]
