"""Who learns from whom as a network: clients on a circle, arrows from sources to receivers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.patches import FancyArrowPatch

from fedml_plugin_fedmosaic.report.style import (
    BASE_COLOUR,
    COLOURS,
    STYLE,
    Cells,
    new_figure,
    to_svg,
)

_SOURCES = 3
"""Most arrows into one client."""
_WIDEST = 5.5
_NODE = 0.115


def main_sources(weights: Cells, most: int = _SOURCES) -> list[tuple[int, int, float]]:
    """The edges that are drawn: (source, receiver, weight), by receiver, heaviest first.

    Of each receiver's sources those with more than an equal share of the weight that it gets from
    others, at most ``most``: where all weights are equal there is no main source, and no edge.
    Weights of a client for itself are not edges.

    Args:
        weights: receivers in rows; None where unknown.
        most: edges per receiver.
    """
    edges = []
    for receiver, row in enumerate(weights):
        others = [
            (value, source)
            for source, value in enumerate(row)
            if source != receiver and value is not None and value > 0
        ]
        if not others:
            continue
        share = sum(value for value, _ in others) / max(1, len(row) - 1)
        heavy = sorted(others, key=lambda item: (-item[0], item[1]))
        kept = [item for item in heavy if item[0] > share * (1 + 1e-6)]
        edges += [(source, receiver, value) for value, source in kept[:most]]
    return edges


def network(weights: Cells, names: Sequence[str], *, label: str, groups: Sequence[str] = ()) -> str:
    """Clients on a circle with arrows from their main sources.

    Args:
        weights: share of each source (column) in what a client (row) receives.
        names: of the clients.
        label: what the figure shows, for screen readers.
        groups: group of each client, for its colour.

    Returns:
        An SVG element.
    """
    order = list(dict.fromkeys(groups))
    colours = [
        COLOURS[order.index(group) % len(COLOURS)] if len(order) > 1 else BASE_COLOUR
        for group in (groups or [""] * len(names))
    ]
    places = [
        (math.sin(2 * math.pi * i / len(names)), math.cos(2 * math.pi * i / len(names)))
        for i in range(len(names))
    ]
    edges = main_sources(weights)
    heaviest = max((weight for _, _, weight in edges), default=1.0)
    with mpl.rc_context(STYLE):
        figure = new_figure(5.4, 5.4)
        axes = figure.subplots()
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_xlim(-1.25, 1.25)
        axes.set_ylim(-1.25, 1.25)
        for source, receiver, weight in sorted(edges, key=lambda edge: edge[2]):
            width = 0.6 + (_WIDEST - 0.6) * weight / heaviest
            arrow = FancyArrowPatch(
                places[source],
                places[receiver],
                connectionstyle="arc3,rad=0.16",
                arrowstyle=f"-|>,head_length={3 + width},head_width={1.6 + width / 2}",
                shrinkA=15,
                shrinkB=16,
                linewidth=width,
                color=colours[source],
                alpha=0.3 + 0.6 * weight / heaviest,
            )
            arrow.set_gid(f"from-{names[source]}-to-{names[receiver]}")
            axes.add_patch(arrow)
        for (x, y), name, colour in zip(places, names, colours, strict=True):
            axes.add_patch(mpl.patches.Circle((x, y), _NODE, color=colour, zorder=3))
            axes.text(
                x, y, name, ha="center", va="center", color="#ffffff", fontweight="bold", zorder=4
            )
        for place, group in enumerate(order if len(order) > 1 else []):
            axes.text(
                -1.25,
                1.24 - 0.1 * place,
                group,
                color=COLOURS[place % len(COLOURS)],
                fontsize=8,
                fontweight="bold",
                va="top",
            )
        return to_svg(figure, label)
