"""Tree-structured Parzen estimator for sweeps, by optuna.

Bergstra, Bardenet, Bengio and Kegl, "Algorithms for hyper-parameter optimization", NeurIPS 2011.
The study lives in memory and is built again from the manifest for every batch, so that a sweep that
was interrupted asks for the same runs as one that was not. No database, no socket.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.launch.sweep_axes import Axis, Grid

_MAX_STARTUP = 10
_ASKS = 25
"""Attempts to be given a configuration that has not run yet."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration that has run: its labels without the seed, and its value (None: failed)."""

    labels: Mapping[str, Any]
    value: float | None


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise LaunchError(
            "--sampler tpe needs optuna, which is not installed",
            hint="pip install 'fedml-plugin-fedmosaic[sweep]', or take --sampler random",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def require_optuna() -> None:
    """Checks that the sampler can work, before anything is submitted.

    Raises:
        LaunchError: optuna is not installed.
    """
    _optuna()


def propose(
    grid: Grid, trials: Sequence[Trial], count: int, *, seed: int, samples: int
) -> list[dict[str, Any]]:
    """The next configurations to run.

    The first ``min(10, max(2, samples // 3))`` configurations are drawn at random, the others where
    good values are more likely than bad ones. A configuration is never proposed twice.

    Args:
        grid: axes; the seed's is left out.
        trials: every configuration that has run, in their order.
        count: how many to propose.
        seed: of the sampler; with the number of trials it gives the batch's own generator.
        samples: configurations of the whole sweep.

    Returns:
        Labels by axis name; fewer than ``count`` when a finite grid is used up.

    Raises:
        LaunchError: optuna is not installed.
    """
    optuna = _optuna()
    axes = tuple(axis for axis in grid if not axis.is_seed)
    distributions = _distributions(axes)
    sampler = optuna.samplers.TPESampler(
        seed=derive_seed(seed, "tpe", len(trials)) % 2**32,
        n_startup_trials=min(_MAX_STARTUP, max(2, samples // 3)),
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        state = optuna.trial.TrialState
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.labels),
                distributions=distributions,
                value=trial.value,
                state=state.FAIL if trial.value is None else state.COMPLETE,
            )
        )
    known = {_key(trial.labels) for trial in trials}
    found: list[dict[str, Any]] = []
    for _ in range(count):
        labels = _ask(study, axes, known) or _unused(axes, known)
        if labels is None:
            break
        known.add(_key(labels))
        found.append(labels)
    return found


def _ask(study: Any, axes: Sequence[Axis], known: set[str]) -> dict[str, Any] | None:
    for _ in range(_ASKS):
        params = study.ask(fixed_distributions=_distributions(axes)).params
        labels = {
            axis.name: axis.range.rounded(params[axis.name]) if axis.range else params[axis.name]
            for axis in axes
        }
        if _key(labels) not in known:
            return labels
    return None


def _unused(axes: Sequence[Axis], known: set[str]) -> dict[str, Any] | None:
    """The first configuration of a finite grid that has not run."""
    if any(axis.range is not None for axis in axes):
        return None
    names = [axis.name for axis in axes]
    for labels in itertools.product(*([level.label for level in axis.levels] for axis in axes)):
        chosen = dict(zip(names, labels, strict=True))
        if _key(chosen) not in known:
            return chosen
    return None


def _distributions(axes: Sequence[Axis]) -> dict[str, Any]:
    return {axis.name: _distribution(axis) for axis in axes}


def _distribution(axis: Axis) -> Any:
    optuna = _optuna()
    bounds = axis.range
    if bounds is None:
        return optuna.distributions.CategoricalDistribution([x.label for x in axis.levels])
    if bounds.whole:
        return optuna.distributions.IntDistribution(
            int(bounds.low), int(bounds.high), log=bounds.log
        )
    return optuna.distributions.FloatDistribution(bounds.low, bounds.high, log=bounds.log)


def _key(labels: Mapping[str, Any]) -> str:
    return json.dumps(dict(labels), sort_keys=True)
