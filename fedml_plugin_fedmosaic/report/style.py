"""The look of all figures: colours safe for all eyes, matplotlib's object API, inline SVG.

Text stays text and takes the page's font and colour (``currentColor``), so that a figure follows
the page's light or dark scheme. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart with any colour vision."""
BASE_COLOUR = "#808080"
HEAT = "cividis"
"""Perceptually uniform, and the same with red-green deficiency."""
DIVERGING = "PuOr_r"
"""For differences: orange above zero, purple below."""
INK = "#010203"
"""Stands for the page's text colour; replaced in the SVG."""
CARD = "#fefdfc"
"""Stands for the colour behind a figure; replaced in the SVG."""

Cells = Sequence[Sequence[float | None]]
Curve = Mapping[int, float]

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmosaic",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure without background; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0.0)
    return figure


def to_svg(figure: Figure, label: str) -> str:
    """The figure as one ``<svg>`` element without fixed size, with ids of its own."""
    stream = io.StringIO()
    figure.savefig(
        stream,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.06,
        metadata={"Date": None},
    )
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace(CARD, "var(--card)")
    width = float(re.search(r'width="([\d.]+)pt"', text).group(1))  # type: ignore[union-attr]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = text.replace(' xmlns="http://www.w3.org/2000/svg"', "").replace("xlink:href", "href")
    # Several figures share a page: ids must not clash.
    salt = re.sub(r"\W+", "-", label.lower())
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r'href="#', f'href="#{salt}-', text)
    text = re.sub(r"url\(#", f"url(#{salt}-", text)
    style = f'style="max-width:{width * 1.25:.0f}px" role="img" aria-label="{label}"'
    return text.replace("<svg", f"<svg {style}", 1).strip()


def round_axis(axes: Axes) -> None:
    """An x axis of whole rounds."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)


def task_line(axes: Axes, round_idx: int, name: str) -> None:
    """An upright line between the round before ``round_idx`` (0-based) and it, with a name."""
    line = axes.axvline(round_idx + 0.5, color=BASE_COLOUR, alpha=0.55, linewidth=0.9, zorder=0)
    line.set_gid(f"task-{round_idx + 1}")
    axes.annotate(
        name,
        (round_idx + 0.5, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -1),
        textcoords="offset points",
        color=BASE_COLOUR,
        fontsize=8,
        va="top",
    )


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the lines' ends instead of a legend, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    place = float("-inf")
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + gap)
        axes.annotate(
            name,
            (x, place),
            xytext=(9, 0),
            textcoords="offset points",
            color=colour or INK,
            fontweight="bold" if colour else "normal",
            va="center",
            annotation_clip=False,
        )


def standalone(svg: str, *, ink: str = "#3c4650", card: str = "#ffffff") -> str:
    """A figure as a file of its own, with colours that stand on light and dark paper.

    Args:
        svg: a figure of this package.
        ink: colour of text and lines.
        card: colour of separators.
    """
    named = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return named.replace("currentColor", ink).replace("var(--card)", card) + "\n"
