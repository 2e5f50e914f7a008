"""From FedML's flat ``args`` to our validated :class:`Experiment`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.fedml_keys import REFUSED
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import SECTION_OF, Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, IntegrationError

LOG = logging.getLogger(__name__)

_FLAT = ("common", "train", "device", "comm", "dp")
_BY_OPTION = frozenset({"federated_optimizer", "backend"})
# FedML writes its own values into these, and we do not use them.
_FEDMLS_OWN = frozenset({"config_version", "scenario"})


def refuse_unsupported(args: Any) -> None:
    """Stops what FedML offers and a run of ours cannot honour.

    Raises:
        IntegrationError: the training type is not simulation.
        ConfigError: a switch is on that must be off (encryption, attacks, defences, tracking).
    """
    training_type = getattr(args, "training_type", None)
    if training_type not in (None, "simulation"):
        name = getattr(args, "federated_optimizer", "this algorithm")
        raise IntegrationError(
            f"{name}: training_type {training_type!r} is not supported yet; use simulation",
            hint="set common_args.training_type: simulation, with comm_args.backend: sp or MPI",
        )
    for switch, reason in REFUSED.items():
        value = getattr(args, switch, False)
        # FedML copies FEDML_USING_MLOPS as text.
        if value not in (False, None, "") and str(value).lower() not in ("false", "0"):
            raise ConfigError(f"{switch} must be false: {reason}")


def experiment_from_args(args: Any) -> Experiment:
    """The experiment that FedML's arguments describe.

    The YAML file that FedML was given is read and checked again by us; attributes of ``args`` that
    a main program has changed since (``args.comm_round = 2``) take precedence over it. Without a
    file, the bundled quickstart is the base.

    Args:
        args: result of ``fedml.load_arguments`` or ``fedml.init``, or any object with FedML's keys
            as attributes.

    Raises:
        ConfigError: the file or a changed attribute is wrong.
        IntegrationError: the training type is not simulation.
    """
    refuse_unsupported(args)
    given = getattr(args, "yaml_config_file", None)
    path = Path(given) if given else None
    if path is None:
        LOG.info("no configuration file given (--cf): using the bundled quickstart")
    experiment = load_experiment(path)
    changes = list(_changes(args, experiment))
    algo = str(getattr(args, "federated_optimizer", None) or experiment.algo)
    backend = str(getattr(args, "backend", None) or experiment.comm.backend)
    same = algo.lower() == experiment.algo and backend == experiment.comm.backend
    if same and not changes:
        return experiment
    return load_experiment(path, changes, algo=algo, backend=backend)


def fill_args(args: Any, experiment: Experiment) -> None:
    """Adds the keys that FedML asks for and our configuration may omit; changes none."""
    for field in _FLAT:
        section = getattr(experiment, field)
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            if item.name not in _FEDMLS_OWN and value is not None and not hasattr(args, item.name):
                setattr(args, item.name, value)


def _changes(args: Any, experiment: Experiment) -> Iterator[str]:
    """``section.key=value`` for every attribute that differs from the file."""
    for field in _FLAT:
        section = getattr(experiment, field)
        for item in dataclasses.fields(section):
            if item.name in _BY_OPTION | _FEDMLS_OWN or not hasattr(args, item.name):
                continue
            value, current = getattr(args, item.name), getattr(section, item.name)
            # FedML's YAML reader takes 2e-5 for text.
            if value == current or (isinstance(value, str) and value == str(current)):
                continue
            if isinstance(value, str) and isinstance(current, float):
                if _number(value) != current:
                    yield f"{SECTION_OF[field][0]}.{item.name}={value}"
                continue
            yield f"{SECTION_OF[field][0]}.{item.name}={json.dumps(value)}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
