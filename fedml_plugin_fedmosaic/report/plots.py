"""Lines over rounds, bars and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl

from fedml_plugin_fedmosaic.report.style import (
    BASE_COLOUR,
    COLOURS,
    INK,
    STYLE,
    Curve,
    label_ends,
    new_figure,
    round_axis,
    task_line,
    to_svg,
)

_WIDTH = 6.6
"""Inches that panels share beside the names."""
_CHARACTER = 0.085
"""Inches of a title's character, on average and a little more."""
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def _shown(curve: Curve, scale: float) -> tuple[list[int], list[float]]:
    """Rounds (1-based; 0 is the state before the first) and scaled values."""
    return [round_idx + 1 for round_idx in curve], [scale * value for value in curve.values()]


def curves(
    clients: Mapping[str, Mapping[int, Curve]],
    means: Mapping[str, Curve],
    *,
    ylabel: str,
    label: str,
    scale: float = 1.0,
    reference: tuple[str, float] | None = None,
    marks: Mapping[str, Sequence[int]] | None = None,
    boundaries: Sequence[int] = (),
) -> str:
    """Lines over rounds: clients faint, their mean bold, one colour a strategy.

    Args:
        clients: strategy -> client -> curve.
        means: strategy -> mean curve.
        ylabel: axis label with its unit.
        label: what the figure shows, for screen readers.
        scale: factor on all values.
        reference: name and value of a dashed level, before scaling.
        marks: strategy -> 0-based rounds with a dotted upright line in its colour.
        boundaries: 0-based rounds in which a new task begins: a grey line before each.

    Returns:
        An SVG element.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(7.2, 3.3)
        axes = figure.subplots()
        for place, round_idx in enumerate(boundaries, start=2):
            task_line(axes, round_idx, f"task {place}")
        ends = []
        for number, (name, mean_curve) in enumerate(means.items()):
            colour = COLOURS[number % len(COLOURS)]
            for line in clients.get(name, {}).values():
                axes.plot(*_shown(line, scale), color=colour, alpha=0.22, linewidth=0.9)
            for round_idx in (marks or {}).get(name, ()):
                mark = axes.axvline(round_idx + 1, color=colour, linestyle=":", linewidth=1.1)
                mark.set_gid(f"resumed-{name}-{round_idx + 1}")
            rounds, values = _shown(mean_curve, scale)
            marker = "o" if len(rounds) <= 12 else None
            axes.plot(rounds, values, color=colour, linewidth=2.4, marker=marker, markersize=4)
            if values:
                ends.append((rounds[-1], values[-1], name, colour))
        if reference is not None and ends:
            level, last = scale * reference[1], max(end[0] for end in ends)
            axes.plot(
                [1, last], [level] * 2, color=BASE_COLOUR, linestyle=(0, (4, 3)), linewidth=1.3
            )
            ends.append((last, level, reference[0], ""))
        label_ends(axes, ends)
        round_axis(axes)
        axes.set_ylabel(ylabel)
        return to_svg(figure, label)


def update_curves(
    singles: Mapping[str, Mapping[int, Curve]],
    means: Mapping[str, Curve],
    *,
    ylabel: str,
    label: str,
    scale: float = 1.0,
) -> str:
    """Lines over optimizer steps: single tasks faint, their mean bold, one colour a start.

    Args:
        singles: start -> task -> steps -> value.
        means: start -> steps -> mean value.
        ylabel: axis label with its unit.
        label: what the figure shows, for screen readers.
        scale: factor on all values.

    Returns:
        An SVG element.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(6.4, 3.1)
        axes = figure.subplots()
        ends = []
        for number, (name, line) in enumerate(means.items()):
            colour = COLOURS[number % len(COLOURS)]
            for single in singles.get(name, {}).values():
                values = [scale * value for value in single.values()]
                axes.plot(list(single), values, color=colour, alpha=0.22, linewidth=0.9)
            values = [scale * value for value in line.values()]
            axes.plot(list(line), values, color=colour, linewidth=2.4, marker="o", markersize=4)
            if values:
                ends.append((max(line), values[-1], name, colour))
        label_ends(axes, ends)
        axes.set_xticks(sorted({steps for line in means.values() for steps in line}))
        axes.set_xlabel("updates")
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.7)
        axes.set_axisbelow(True)
        return to_svg(figure, label)


def byte_bars(up: Mapping[int, float], down: Mapping[int, float], *, label: str) -> str:
    """Bytes of all clients per round, sent and received side by side.

    Args:
        up: round_idx -> bytes sent by all clients.
        down: round_idx -> bytes received by all clients.
        label: what the figure shows, for screen readers.

    Returns:
        An SVG element.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(7.2, 2.5)
        axes = figure.subplots()
        rounds = sorted({*up, *down})
        most = max([*up.values(), *down.values()], default=0.0)
        unit, size = next((pair for pair in _UNITS if most >= pair[1]), _UNITS[-1])
        for offset, colour, name, series in (
            (-0.2, COLOURS[0], "sent by clients", up),
            (0.2, COLOURS[1], "received by clients", down),
        ):
            heights = [series.get(round_idx, 0.0) / size for round_idx in rounds]
            places = [round_idx + 1 + offset for round_idx in rounds]
            axes.bar(places, heights, width=0.37, color=colour, label=name)
        axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_ylabel(f"{unit} per round")
        round_axis(axes)
        return to_svg(figure, label)


def intervals(
    groups: Mapping[str, Sequence[tuple[str, float, float | None, Sequence[float]]]],
    *,
    xlabel: str,
    label: str,
    zero: bool = False,
    one_scale: bool = False,
) -> str:
    """Means with confidence intervals and the single values behind them, one panel a group.

    Panels stand in one row, or in several where their titles need the room.

    Args:
        groups: panel title -> (name, mean, half width or None, values).
        xlabel: axis label with its unit.
        label: what the figure shows, for screen readers.
        zero: draw a line at zero (for differences).
        one_scale: the panels show the same measure, on one scale.

    Returns:
        An SVG element.
    """
    height = max((len(items) for items in groups.values()), default=1)
    fitting = _WIDTH // (0.3 + _CHARACTER * max(map(len, groups), default=1))
    num_rows = math.ceil(len(groups) / max(1, fitting))
    num_columns = math.ceil(len(groups) / max(1, num_rows))
    with mpl.rc_context(STYLE):
        figure = new_figure(7.4, (0.42 * height + 1.0) * num_rows)
        panels = figure.subplots(
            num_rows, num_columns, squeeze=False, sharey=True, sharex=one_scale
        ).flatten()
        for axes in panels[len(groups) :]:
            axes.remove()
        for axes, (title, items) in zip(panels[: len(groups)], groups.items(), strict=True):
            for place, (_, centre, half, values) in enumerate(items):
                colour = COLOURS[place % len(COLOURS)]
                axes.plot(values, [place] * len(values), "|", color=colour, alpha=0.6, ms=9)
                axes.errorbar(centre, place, xerr=half, fmt="o", color=colour, capsize=3, ms=6)
            axes.set_yticks(range(len(items)), [item[0] for item in items])
            axes.set_ylim(len(items) - 0.5, -0.5)
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel(xlabel)
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.7)
            if zero:
                axes.axvline(0, color=INK, linewidth=0.9)
        return to_svg(figure, label)
