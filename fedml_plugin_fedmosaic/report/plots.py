"""Figures as inline SVG: matplotlib's object API, no global state, colours safe for all eyes.

Text stays text and takes the page's font and colour (``currentColor``), so that a figure follows
the page's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart with any colour vision."""
BASE_COLOUR = "#808080"
HEAT = "cividis"
"""Perceptually uniform, and the same with red-green deficiency."""
DIVERGING = "PuOr_r"
"""For differences: orange above zero, purple below."""
_INK = "#010203"
"""Stands for the page's text colour; replaced in the SVG."""
_CARD = "#fefdfc"
"""Stands for the colour behind a figure; replaced in the SVG."""
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))

Cells = Sequence[Sequence[float | None]]
Curve = Mapping[int, float]

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmosaic",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0.0)
    return figure


def _svg(figure: Figure, label: str) -> str:
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
    text = text.replace(_INK, "currentColor").replace(_CARD, "var(--card)")
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


def _round_axis(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)


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

    Returns:
        An SVG element.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure(7.2, 3.3)
        axes = figure.subplots()
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
        _label_ends(axes, ends)
        _round_axis(axes)
        axes.set_ylabel(ylabel)
        return _svg(figure, label)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
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
            color=colour or _INK,
            fontweight="bold" if colour else "normal",
            va="center",
            annotation_clip=False,
        )


def _ink_on(value: float, norm: Normalize, palette: str) -> str:
    """Black or white, whichever stands out on the cell's colour."""
    red, green, blue, _ = colormaps[palette](float(norm(value)))
    return "#101010" if 0.30 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"


def _groups(axes: Axes, groups: Sequence[str], *, both: bool) -> None:
    """Lines between neighbouring clients of different groups."""
    for i in range(1, len(groups)):
        if groups[i] != groups[i - 1]:
            axes.axhline(i - 0.5, color=_CARD, linewidth=3)
            if both:
                axes.axvline(i - 0.5, color=_CARD, linewidth=3)


def heat_map(
    cells: Cells,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    bar: str,
    groups: Sequence[str] = (),
    scale: float = 1.0,
    digits: int = 2,
    diverging: bool = False,
    marks: Sequence[tuple[int, int]] = (),
    xlabel: str = "",
    ylabel: str = "",
) -> str:
    """A matrix with its numbers written into the cells; None stays empty.

    Args:
        cells: values, row by row.
        rows: row labels.
        columns: column labels.
        label: what the figure shows, for screen readers.
        bar: label of the colour bar.
        groups: group of each row (and column, if the matrix is square), for separators.
        scale: factor on the values before they are shown.
        digits: decimals in the cells.
        diverging: the values are differences: centre the colours on zero.
        marks: (row, column) of cells to frame.
        xlabel: what the columns are.
        ylabel: what the rows are.

    Returns:
        An SVG element.
    """
    values = [[None if v is None else scale * v for v in row] for row in cells]
    known = [v for row in values for v in row if v is not None] or [0.0]
    palette = DIVERGING if diverging else HEAT
    norm = _norm(known, diverging=diverging)
    size = 0.46 if max(len(rows), len(columns)) <= 20 else 0.26
    with mpl.rc_context(_STYLE):
        figure = _figure(2.4 + 1.16 * size * len(columns), 1.3 + 0.9 * size * len(rows))
        axes = figure.subplots()
        image = _image(axes, values, norm, aspect=0.78, palette=palette)
        turned = max(map(len, columns)) > 3
        axes.set_xticks(
            range(len(columns)),
            columns,
            rotation=38 if turned else 0,
            ha="right" if turned else "center",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if max(len(rows), len(columns)) <= 20:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    if value is not None:
                        ink = _ink_on(value, norm, palette)
                        text = f"{value:.{digits}f}"
                        axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
        if groups:
            _groups(axes, groups, both=len(columns) == len(groups))
        for i, j in marks:
            axes.add_patch(
                mpl.patches.Rectangle(
                    (j - 0.46, i - 0.46),
                    0.92,
                    0.92,
                    fill=False,
                    edgecolor="#101010" if diverging else "#D55E00",
                    linewidth=2,
                )
            )
        _colour_bar(figure, image, axes, label=bar)
        return _svg(figure, label)


def _colour_bar(
    figure: Figure, image: mpl.cm.ScalarMappable, axes: Axes | list[Axes], label: str = ""
) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label=label)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        # Matplotlib would embed a long bar as a bitmap.
        bar.solids.set_rasterized(False)
        bar.solids.set_edgecolor("face")


def _norm(known: Sequence[float], *, diverging: bool) -> Normalize:
    low, high = min(known), max(known)
    if diverging:
        high = max(abs(low), abs(high))
        low = -high
    return Normalize(low, high if high > low else low + 1)


def _image(
    axes: Axes, values: Cells, norm: Normalize, *, aspect: float, palette: str = HEAT
) -> mpl.cm.ScalarMappable:
    """Cells as vector rectangles: an embedded bitmap would blur when printed."""
    nan = float("nan")
    data = [[nan if value is None else value for value in row] for row in values]
    width, height = len(data[0]), len(data)
    mesh = axes.pcolormesh(
        [j - 0.5 for j in range(width + 1)],
        [i - 0.5 for i in range(height + 1)],
        data,
        cmap=colormaps[palette],
        norm=norm,
    )
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_aspect(aspect)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def small_multiples(
    matrices: Mapping[str, Cells], *, label: str, groups: Sequence[str] = ()
) -> str:
    """Several matrices of one size side by side on one colour scale.

    Args:
        matrices: title -> values, row by row.
        label: what the figure shows, for screen readers.
        groups: group of each row and column, for separators.

    Returns:
        An SVG element.
    """
    known = [v for cells in matrices.values() for row in cells for v in row if v is not None]
    norm = Normalize(min(known, default=0.0), max(known, default=1.0))
    count = len(matrices)
    per_row = min(count, 6)
    lines = -(-count // per_row)
    with mpl.rc_context(_STYLE):
        figure = _figure(1.45 * per_row + 0.7, 1.6 * lines)
        grid = figure.subplots(lines, per_row, squeeze=False).ravel().tolist()
        image = None
        for axes, (title, cells) in zip(grid[:count], matrices.items(), strict=True):
            image = _image(axes, cells, norm, aspect=1.0)
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            if groups:
                _groups(axes, groups, both=True)
        for axes in grid[count:]:
            axes.set_visible(False)
        if image is not None:
            _colour_bar(figure, image, grid)
        return _svg(figure, label)


def byte_bars(up: Mapping[int, float], down: Mapping[int, float], *, label: str) -> str:
    """Bytes of all clients per round, sent and received side by side.

    Args:
        up: round_idx -> bytes sent by all clients.
        down: round_idx -> bytes received by all clients.
        label: what the figure shows, for screen readers.

    Returns:
        An SVG element.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure(7.2, 2.5)
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
        _round_axis(axes)
        return _svg(figure, label)


def intervals(
    groups: Mapping[str, Sequence[tuple[str, float, float | None, Sequence[float]]]],
    *,
    xlabel: str,
    label: str,
    zero: bool = False,
) -> str:
    """Means with confidence intervals and the single values behind them, one panel a group.

    Args:
        groups: panel title -> (name, mean, half width or None, values).
        xlabel: axis label with its unit.
        label: what the figure shows, for screen readers.
        zero: draw a line at zero (for differences).

    Returns:
        An SVG element.
    """
    height = max((len(items) for items in groups.values()), default=1)
    with mpl.rc_context(_STYLE):
        figure = _figure(7.4, 0.42 * height + 1.0)
        panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        for axes, (title, items) in zip(panels, groups.items(), strict=True):
            for place, (_, centre, half, values) in enumerate(items):
                colour = COLOURS[place % len(COLOURS)]
                axes.plot(values, [place] * len(values), "|", color=colour, alpha=0.6, ms=9)
                axes.errorbar(centre, place, xerr=half, fmt="o", color=colour, capsize=3, ms=6)
            axes.set_yticks(range(len(items)), [item[0] for item in items])
            axes.set_ylim(len(items) - 0.5, -0.5)
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel(xlabel)
            axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.7)
            if zero:
                axes.axvline(0, color=_INK, linewidth=0.9)
        return _svg(figure, label)
