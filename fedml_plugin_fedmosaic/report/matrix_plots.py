"""Matrices as figures: heat maps with their numbers, and small multiples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from fedml_plugin_fedmosaic.report.style import (
    CARD,
    COLOURS,
    DIVERGING,
    HEAT,
    STYLE,
    Cells,
    new_figure,
    to_svg,
)

_LEGEND = 16
"""Most groups that a legend names."""


def _ink_on(value: float, norm: Normalize, palette: str | Colormap) -> str:
    """Black or white, whichever stands out on the cell's colour."""
    red, green, blue, _ = mpl.colormaps.get_cmap(palette)(float(norm(value)))
    return "#101010" if 0.30 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"


def _groups(axes: Axes, groups: Sequence[str], *, both: bool) -> None:
    """Lines between neighbouring clients of different groups."""
    for i in range(1, len(groups)):
        if groups[i] != groups[i - 1]:
            axes.axhline(i - 0.5, color=CARD, linewidth=3)
            if both:
                axes.axvline(i - 0.5, color=CARD, linewidth=3)


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
    with mpl.rc_context(STYLE):
        figure = new_figure(2.4 + 1.16 * size * len(columns), 1.3 + 0.9 * size * len(rows))
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
        return to_svg(figure, label)


def thinned(rounds: Sequence[int], most: int) -> list[int]:
    """At most ``most`` rounds for a figure, evenly spread, first and last included."""
    if len(rounds) <= most:
        return list(rounds)
    return [rounds[round(i * (len(rounds) - 1) / (most - 1))] for i in range(most)]


def membership(
    cells: Sequence[Sequence[str | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    separators: Sequence[str] = (),
) -> str:
    """Which group each row is in, column by column: a colour per group, None stays empty.

    Args:
        cells: names of groups, row by row.
        rows: row labels.
        columns: column labels.
        label: what the figure shows, for screen readers.
        separators: kind of each row, for lines between the kinds.

    Returns:
        An SVG element.
    """
    names = sorted({name for row in cells for name in row if name is not None})
    number = {name: index for index, name in enumerate(names)}
    palette = _palette(len(names))
    size = 0.34 if len(columns) <= 20 else 0.2
    with mpl.rc_context(STYLE):
        figure = new_figure(2.6 + size * len(columns), 1.1 + 0.26 * len(rows))
        axes = figure.subplots()
        values = [[None if name is None else float(number[name]) for name in row] for row in cells]
        _image(axes, values, Normalize(-0.5, len(names) - 0.5), aspect="auto", palette=palette)
        axes.set_xticks(range(len(columns)), columns)
        if len(columns) > 20:
            axes.set_xticks(range(0, len(columns), 5), columns[::5])
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("round")
        for i, row in enumerate(cells):
            for j, name in enumerate(row if len(columns) <= 20 else ()):
                if name is not None:
                    ink = _ink_on(number[name], Normalize(-0.5, len(names) - 0.5), palette)
                    axes.text(j, i, name, ha="center", va="center", color=ink, fontsize=8)
        if separators:
            _groups(axes, separators, both=False)
        if len(names) <= _LEGEND:
            handles = [mpl.patches.Patch(color=palette(number[name]), label=name) for name in names]
            axes.legend(
                handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
            )
        return to_svg(figure, label)


def _palette(count: int) -> ListedColormap:
    """Colours of so many groups; from seven on, neighbours in one scale."""
    if count <= len(COLOURS):
        return ListedColormap(COLOURS[: max(count, 1)])
    return ListedColormap([colormaps[HEAT](index / (count - 1)) for index in range(count)])


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
    axes: Axes,
    values: Cells,
    norm: Normalize,
    *,
    aspect: float | Literal["auto"],
    palette: str | Colormap = HEAT,
) -> mpl.cm.ScalarMappable:
    """Cells as vector rectangles: an embedded bitmap would blur when printed."""
    nan = float("nan")
    data = [[nan if value is None else value for value in row] for row in values]
    width, height = len(data[0]), len(data)
    mesh = axes.pcolormesh(
        [j - 0.5 for j in range(width + 1)],
        [i - 0.5 for i in range(height + 1)],
        data,
        cmap=palette,
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
    with mpl.rc_context(STYLE):
        figure = new_figure(1.45 * per_row + 0.7, 1.6 * lines)
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
        return to_svg(figure, label)
