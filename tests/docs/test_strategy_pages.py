from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.strategy_pages import strategy_page
from fedml_plugin_fedmosaic.core.registry import STRATEGIES

DOCS = Path(__file__).parents[2] / "docs"
PAGES = DOCS / "strategies"


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_page_is_what_the_strategy_says(name: str) -> None:
    page = strategy_page(name)
    assert (PAGES / f"{name}.md").read_text() == page, (
        "run: fedmosaic config strategies docs/strategies"
    )
    assert f"fedml run --algo {name}\n" in page
    assert "::" not in page
    assert page.count("```") % 2 == 0
    # Equations, source, and what happens across architectures.
    assert "```text" in page.partition("## In a run")[0]
    assert re.search(r"arXiv\s\d{4}\.\d{4,5}|Source:", page)


def test_there_are_no_other_pages_and_all_can_be_found() -> None:
    assert sorted(path.stem for path in PAGES.iterdir()) == sorted(STRATEGIES)
    choose = (DOCS / "strategies.md").read_text()
    nav = (DOCS.parent / "mkdocs.yml").read_text()
    for name in STRATEGIES:
        assert f"(strategies/{name}.md)" in choose, name
        assert f"{name}: strategies/{name}.md" in nav, name


def test_the_table_of_steps_is_true() -> None:
    rows = re.findall(r"^\| (`.*`) \| (\d+)", (DOCS / "strategies.md").read_text(), re.MULTILINE)
    told = {name: int(steps) for names, steps in rows for name in re.findall(r"`(\w+)`", names)}
    assert len(told) == 11
    for name, steps in told.items():
        strategy = STRATEGIES[name](STRATEGIES[name].Options())
        assert round(100 * strategy.cost.share) == steps, name


def test_the_command_writes_all_pages(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["config", "strategies", str(tmp_path / "pages")])
    assert result.exit_code == 0, result.output
    written = {path.name: path.read_text() for path in (tmp_path / "pages").iterdir()}
    assert written == {f"{name}.md": strategy_page(name) for name in STRATEGIES}
