"""Whether a run finds everything it needs without the internet, before it is submitted."""

from __future__ import annotations

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import SOURCES
from fedml_plugin_fedmosaic.engine.hub import missing_models
from fedml_plugin_fedmosaic.runtime.alignment import missing_alignments


def missing_offline(experiment: Experiment) -> list[str]:
    """One line for every model and data file that is not there yet.

    Of the configured models only those that the scenario or the sketches use are looked for, if
    the scenario is there to say so.
    """
    lines: list[str] = []
    used: frozenset[str] | None = None
    if experiment.data.source in SOURCES:
        source = SOURCES[experiment.data.source]()
        lines += source.missing(experiment.data)
        used = source.models(experiment.data)
    models = {
        name: spec
        for name, spec in experiment.models.items()
        if used is None or name in used or name == experiment.sketch.proxy
    }
    # A model that is only the proxy carries no adapter.
    trained = [
        name
        for name, spec in models.items()
        if (name in used if used is not None else spec.quantization != "int8")
    ]
    return [*missing_models(models), *missing_alignments(experiment, trained), *lines]


def require_offline(experiment: Experiment) -> None:
    """Checks that a run needs no internet.

    Raises:
        ConfigError: something is missing; all of it is named.
    """
    missing = missing_offline(experiment)
    if missing:
        raise ConfigError(
            "\n".join(missing),
            hint="on a machine with internet: 'fedmosaic models fetch --cf FILE' and "
            "'fedmosaic data fetch --cf FILE'",
        )
