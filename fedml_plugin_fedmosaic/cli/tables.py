"""Tables of text cells on a terminal or in a log file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class TextTable(Protocol):
    """What is needed of a table; ``notes``, ``num_left`` and ``num_footer`` are optional."""

    @property
    def columns(self) -> Sequence[str]:
        """Headers; a newline starts a second line."""
        ...

    @property
    def rows(self) -> Sequence[Sequence[str]]:
        """Cells, one list per row."""
        ...


def print_table(table: TextTable, console: Console | None = None, title: str | None = None) -> None:
    """Prints a table; where the output is not a terminal, it is never cut or wrapped.

    Args:
        table: columns, rows and, if it has them, ``notes``, ``num_left`` leading text columns
            and ``num_footer`` rows that sum up the others.
        console: where to; standard output by default.
        title: printed above.
    """
    console = console or Console()
    num_left = getattr(table, "num_left", 1)
    num_footer = getattr(table, "num_footer", 0)
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, name in enumerate(table.columns):
        shown.add_column(
            Text(name), justify="left" if index < num_left else "right", vertical="bottom"
        )
    first_footer = len(table.rows) - num_footer
    for index, row in enumerate(table.rows):
        shown.add_row(*map(Text, row), end_section=index == first_footer - 1)
    if not console.is_terminal:
        wide = Console(width=10_000)
        console.width = max(console.width, Measurement.get(wide, wide.options, shown).maximum)
    console.print(shown)
    for note in getattr(table, "notes", ()):
        console.print(note, style="dim", markup=False, highlight=False)
