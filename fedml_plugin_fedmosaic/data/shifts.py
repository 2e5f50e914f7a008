"""How data change over the rounds: label, group and time shift, and tasks that come and go.

Sources: the axes of FedMedICL (MICCAI 2024: label, demographic and temporal shift, and a disease
that appears in one place after the other) and the setting of FedTAP (tasks that appear and
disappear at different times), as schedules over any samples.

Everything is a function of the options, the root seed and the client; no state, no files.

A task k of a client arrives in a window of rounds, [k R/K, (k+1) R/K) for R rounds and K tasks
unless options say otherwise, at a constant rate. Which of its samples come in which of its rounds
depends on the shift:

* none: in random order;
* time: ascending in a field of the samples;
* label, group: every answer c has a share p_c[r] of each round r of the window,
  p_c ~ Dirichlet(alpha); round r draws its samples from those left, without replacement, with
  probability proportional to p_label[r] * p_group[r].
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.config.shift import ShiftConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample

_MAX_DENOMINATOR = 10_000
_SMALLEST_SHARE = 1e-12

Item = tuple[int, int]
"""Task and position of a sample in a client's data."""


@dataclass(frozen=True, slots=True)
class Window:
    """When samples arrive, in rounds from 0: from ``start`` up to, not including, ``end``."""

    start: Fraction
    end: Fraction

    def counts(self, total: int, num_rounds: int) -> list[int]:
        """How many of ``total`` samples arrive in each round, at a constant rate.

        Samples of a window that reaches beyond the last round do not all arrive.
        """
        length = self.end - self.start
        seen = [
            int(total * min(max((edge - self.start) / length, Fraction(0)), Fraction(1)))
            for edge in map(Fraction, range(num_rounds + 1))
        ]
        return [after - before for before, after in pairwise(seen)]

    def not_before(self, first: Fraction, num_rounds: int) -> Window | None:
        """What is held back until ``first``; None if that is after the last round."""
        if first >= num_rounds:
            return None
        if first <= self.start:
            return self
        return Window(first, self.end if first < self.end else Fraction(num_rounds))


def label_of(sample: Sample) -> str:
    """The sample's answer, as labels are compared."""
    return " ".join(sample.answer.split()).casefold()


def group_of(sample: Sample, field: str | None) -> str:
    """The sample's group.

    Args:
        sample: any sample.
        field: name of the attribute; the folder of the sample's first image when None.

    Raises:
        DataError: the sample has no such attribute, or no image.
    """
    if field is not None:
        return str(_attribute(sample, field, "group_field"))
    if not sample.images:
        raise DataError(
            f"sample {sample.sample_id} of task {sample.task} has no image whose folder could be "
            "its group",
            hint="set shift.group_field to a field of the samples",
        )
    return sample.images[0].parent.name


def arrivals(
    client: ClientData,
    *,
    num_rounds: int,
    data: DataConfig,
    shift: ShiftConfig,
    seed: int,
) -> tuple[tuple[Item, ...], ...]:
    """Which of a client's samples arrive in which round.

    Args:
        client: its tasks and samples, tasks in the scenario's order.
        num_rounds: rounds of the run.
        data: ``split`` and ``rounds_per_task``.
        shift: what changes.
        seed: root seed.

    Returns:
        For each round the arriving samples in order; may be empty.

    Raises:
        DataError: a sample lacks a field that the shift reads.
    """
    rounds: list[list[Item]] = [[] for _ in range(num_rounds)]
    windows = task_windows(client, num_rounds=num_rounds, data=data, shift=shift, seed=seed)
    release = Fraction(shift.novel_round - 1) + client.client_id * _exact(shift.novel_lag)
    for task, samples in enumerate(client.train):
        new = {place for place, sample in enumerate(samples) if is_novel(sample, shift)}
        known = [place for place in range(len(samples)) if place not in new]
        parts = [
            (known, windows[task]),
            (sorted(new), windows[task].not_before(release, num_rounds)),
        ]
        for part, (places, window) in enumerate(parts):
            if window is None or not places:
                continue
            rng = python_random(seed, "shift", client.client_id, task, part)
            counts = window.counts(len(places), num_rounds)
            shares = _by_round([samples[place] for place in places], counts, shift, rng)
            for arrived, share in zip(rounds, shares, strict=True):
                arrived += [(task, places[index]) for index in share]
    if data.split == "static":
        for index, arrived in enumerate(rounds):
            python_random(seed, "shift mix", client.client_id, index).shuffle(arrived)
    return tuple(map(tuple, rounds))


def task_windows(
    client: ClientData, *, num_rounds: int, data: DataConfig, shift: ShiftConfig, seed: int
) -> tuple[Window, ...]:
    """When each task of a client arrives, in the scenario's order of tasks."""
    count = len(client.tasks)
    order = list(range(count))
    if shift.task_order == "rotated":
        order = [(client.client_id + place) % count for place in order]
    elif shift.task_order == "shuffled":
        python_random(seed, "task order", client.client_id).shuffle(order)
    length = _exact(data.rounds_per_task) if data.rounds_per_task else Fraction(num_rounds, count)
    overlap, end = _exact(shift.overlap), Fraction(num_rounds)
    windows: dict[int, Window] = {}
    for place, task in enumerate(order):
        named = shift.windows.get(client.tasks[task].name)
        if named is not None:
            windows[task] = Window(Fraction(named[0] - 1), Fraction(named[1]))
        elif data.split == "static":
            windows[task] = Window(Fraction(0), end)
        else:
            last = (place + 1 + overlap) * length
            windows[task] = Window(place * length, min(last, max(end, (place + 1) * length)))
    return tuple(windows[task] for task in range(count))


def is_novel(sample: Sample, shift: ShiftConfig) -> bool:
    """Whether the sample is of what ``shift.novel`` names."""
    if shift.novel is None:
        return False
    kind, _, value = shift.novel.partition(":")
    if kind == "task":
        return sample.task == value
    if kind == "label":
        return label_of(sample) == " ".join(value.split()).casefold()
    return group_of(sample, shift.group_field) == value


def check_shift(data: FederatedData, shift: ShiftConfig, num_rounds: int) -> None:
    """Whether the names in the options are there.

    Raises:
        DataError: a task of ``windows`` or a client of ``present`` that the scenario does not
            have, ranges beyond the last round, or a ``novel`` that no sample has.
    """
    unknown = sorted(set(shift.windows) - set(data.tasks))
    if unknown:
        raise DataError(
            f"shift.windows names tasks {unknown}, which scenario {data.name} does not have",
            hint=f"its tasks: {', '.join(sorted(data.tasks))}",
        )
    late = {name: first for name, (first, _) in shift.windows.items() if first > num_rounds}
    if late:
        raise DataError(f"shift.windows: {late} begin after the last round, {num_rounds}")
    strangers = sorted(set(shift.attendance) - {client.client_id for client in data.clients})
    if strangers:
        raise DataError(
            f"shift.present names clients {strangers}; scenario {data.name} has clients "
            f"0..{len(data.clients) - 1}"
        )
    everything = (s for client in data.clients for samples in client.train for s in samples)
    if shift.novel is not None and not any(is_novel(sample, shift) for sample in everything):
        raise DataError(
            f"shift.novel is {shift.novel!r}, but no training sample is of it",
            hint="a label is a whole answer, a task a name such as VSR-0",
        )


def _by_round(
    samples: Sequence[Sample], counts: Sequence[int], shift: ShiftConfig, rng: random.Random
) -> list[list[int]]:
    """Positions of the samples that arrive in each round."""
    order = list(range(len(samples)))
    rng.shuffle(order)
    if shift.time_field is not None:
        field = shift.time_field
        order.sort(key=lambda place: _time_key(_attribute(samples[place], field, "time_field")))
    active = [index for index, count in enumerate(counts) if count > 0]
    shares: list[Mapping[str, Mapping[int, float]]] = []
    keys: list[list[str]] = []
    if shift.label_alpha is not None:
        keys.append([label_of(sample) for sample in samples])
        shares.append(_dirichlet_shares(keys[-1], active, shift.label_alpha, rng))
    if shift.group_alpha is not None:
        keys.append([group_of(sample, shift.group_field) for sample in samples])
        shares.append(_dirichlet_shares(keys[-1], active, shift.group_alpha, rng))
    result: list[list[int]] = []
    for index, count in enumerate(counts):
        if shares and count:
            weight = {
                place: math.prod(
                    share[key[place]][index] for share, key in zip(shares, keys, strict=True)
                )
                for place in order
            }
            chosen = _weighted(order, weight, count, rng)
        else:
            chosen = order[:count]
        taken = set(chosen)
        order = [place for place in order if place not in taken]
        result.append(chosen)
    return result


def _weighted(
    order: Sequence[int], weight: Mapping[int, float], count: int, rng: random.Random
) -> list[int]:
    """``count`` of the places without replacement, as if drawn one by one (Efraimidis-Spirakis)."""
    keys = [(math.log(1.0 - rng.random()) / weight[place], place) for place in order]
    keys.sort(key=lambda key: -key[0])
    return [place for _, place in keys[:count]]


def _dirichlet_shares(
    keys: Sequence[str], active: Sequence[int], alpha: float, rng: random.Random
) -> dict[str, dict[int, float]]:
    """Key -> round -> share; each key's shares are one draw from Dirichlet(alpha)."""
    found: dict[str, dict[int, float]] = {}
    for key in sorted(set(keys)):
        drawn = [rng.gammavariate(alpha, 1.0) for _ in active]
        total = sum(drawn) or 1.0
        found[key] = {
            index: max(value / total, _SMALLEST_SHARE)
            for index, value in zip(active, drawn, strict=True)
        }
    return found


def _attribute(sample: Sample, field: str, option: str) -> str | int | float:
    for name, value in sample.attributes:
        if name == field:
            return value
    has = ", ".join(name for name, _ in sample.attributes) or "none"
    raise DataError(
        f"sample {sample.sample_id} of task {sample.task} has no field {field!r} "
        f"(shift.{option}); its fields: {has}"
    )


def _time_key(value: str | int | float) -> tuple[bool, float, str]:
    """Numbers before texts; ISO dates sort as text."""
    if isinstance(value, str):
        return (True, 0.0, value)
    return (False, float(value), "")


def _exact(value: float) -> Fraction:
    return Fraction(value).limit_denominator(_MAX_DENOMINATOR)
