"""One self-contained page per run: ``report.html`` needs no network and no other file."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedml_plugin_fedmosaic.report.metrics import Run, load_run
from fedml_plugin_fedmosaic.report.parts import Headline, Section
from fedml_plugin_fedmosaic.report.sections import all_sections, headlines

REPORT_FILE = "report.html"


def render(*, title: str, subtitle: str, numbers: list[Headline], sections: list[Section]) -> str:
    """The page as HTML text; everything but the SVG figures is escaped."""
    environment = Environment(
        loader=PackageLoader("fedml_plugin_fedmosaic.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    environment.filters["lines"] = lambda text: text.split("\n")
    template = environment.get_template("report.html.j2")
    return template.render(title=title, subtitle=subtitle, numbers=numbers, sections=sections)


def _subtitle(run: Run) -> str:
    rounds = len(run.strategies[run.main].rounds) if run.main is not None else 0
    families = sorted({client.label for client in run.clients})
    parts = [
        f"{len(run.clients)} clients",
        f"{len(run.tasks)} tasks",
        f"{rounds} rounds",
        f"models: {', '.join(families)}",
    ]
    if "seed" in run.environment:
        parts.append(f"seed {run.environment['seed']}")
    return " · ".join(parts)


def write_page(path: Path, text: str) -> Path:
    """Writes a page in one step, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run folder.

    Args:
        run_dir: run folder, finished or not.

    Returns:
        The page's path.

    Raises:
        DataError: the folder is not a run folder, or a file in it is damaged.
    """
    run = load_run(run_dir)
    text = render(
        title=f"{run.main or 'no strategy yet'} · {run_dir.resolve().name}",
        subtitle=_subtitle(run),
        numbers=headlines(run),
        sections=all_sections(run),
    )
    return write_page(run_dir / REPORT_FILE, text)
