"""Figures of an alignment: layers against layers, and canonical correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from fedml_plugin_fedmosaic.report.matrix_plots import heat_map
from fedml_plugin_fedmosaic.report.style import COLOURS, INK, STYLE, label_ends, new_figure, to_svg


def layer_similarity(
    cka: Sequence[Sequence[float]],
    ends: Sequence[tuple[int, int]],
    *,
    anchor: str,
    model: str,
) -> str:
    """CKA of all layers of two models, with the block ends that are put side by side framed.

    Args:
        cka: anchor's layers in rows, the model's in columns.
        ends: block-end layers of anchor and model, 0-based.
        anchor: its name.
        model: its name.

    Returns:
        An SVG element.
    """
    return heat_map(
        cka,
        [str(number + 1) for number in range(len(cka))],
        [str(number + 1) for number in range(len(cka[0]))],
        label=f"CKA between the layers of {anchor} and {model}",
        bar="CKA",
        marks=ends,
        xlabel=f"layer of {model}",
        ylabel=f"layer of {anchor}",
    )


def canonical_lines(blocks: Mapping[str, Mapping[str, Sequence[float]]], *, label: str) -> str:
    """Falling canonical correlations: linears faint, the mean of a block bold.

    Args:
        blocks: block -> linear -> correlations.
        label: what the figure shows, for screen readers.

    Returns:
        An SVG element.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(6.4, 3.2)
        axes = figure.subplots()
        ends = []
        for number, (block, linears) in enumerate(blocks.items()):
            colour = COLOURS[number % len(COLOURS)]
            for values in linears.values():
                axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.22, lw=0.9)
            mean = [sum(values) / len(linears) for values in zip(*linears.values(), strict=True)]
            axes.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2.4)
            ends.append((float(len(mean)), mean[-1], block, colour))
        axes.set_ylim(0.0, 1.02)
        label_ends(axes, ends)
        axes.set_xlabel("direction")
        axes.set_ylabel("canonical correlation")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.7)
        axes.set_axisbelow(True)
        return to_svg(figure, label)
