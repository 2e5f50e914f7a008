"""What a page is made of."""

from __future__ import annotations

from dataclasses import dataclass

from fedml_plugin_fedmosaic.report.tables import SummaryTable


@dataclass(frozen=True, slots=True)
class Figure:
    """An SVG element with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report.

    Attributes:
        anchor: id in the page.
        title: heading.
        lead: a sentence or two under the heading.
        figures: plots in order.
        table: a table, or None.
        text: preformatted text, folded.
    """

    anchor: str
    title: str
    lead: str = ""
    figures: tuple[Figure, ...] = ()
    table: SummaryTable | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Headline:
    """One large number: its name, value and a comparison below it."""

    name: str
    value: str
    detail: str = ""
