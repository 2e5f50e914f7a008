"""What the documentation says exists, and its example runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.schema import reference_markdown
from fedml_plugin_fedmosaic.core import errors
from fedml_plugin_fedmosaic.core.registry import STRATEGIES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def blocks(path: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(path.read_text()) if language in languages]


def without_blocks(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", without_blocks(path), flags=re.MULTILINE)
    slugs = (re.sub(r"[^\w\s-]", "", head.lower()).strip() for head in heads)
    return {re.sub(r"[\s]+", "-", slug) for slug in slugs}


@page
def test_every_block_names_its_language(path):
    assert all(language for language, _ in FENCE.findall(path.read_text()))
    assert path.read_text().count("\n```") % 2 == 0


@page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path)):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        other = path if not file else (path.parent / file).resolve()
        assert other.is_file(), f"{path.name} links to {target}, which does not exist"
        assert other.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(other), f"{path.name} links to {target}: no such heading"


@page
def test_says_nothing_about_where_it_was_written(path):
    assert not re.search(r"(?<![\w.])/(?:work|home|root|opt|tmp)/", path.read_text())


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert all(path.name in text for path in DOCS.glob("*.md"))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in a code block or in back quotes."""
    start = re.compile(r"^(?:fedmosaic|fedml run)(?= |$)")
    for path in PAGES:
        lines = [
            line
            for text in blocks(path, "bash", "text")
            for line in text.replace("\\\n", " ").splitlines()
        ]
        lines += re.findall(r"`([^`\n]+)`", without_blocks(path))
        for line in lines:
            for part in re.split(r"&&|\|", line.strip()):
                command = re.sub(r"^mpiexec -n \d+ ", "", part.strip())
                if start.match(command):
                    yield path.name, shlex.split(command.partition(" > ")[0])


def click_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The click command that the words call, and its arguments."""
    if words[:2] == ["fedml", "run"]:
        from fedml_plugin_fedmosaic.integrations.fedml.command import our_options

        return click.Command("run", params=list(our_options())), words[2:]
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        context = click.Context(command)
        found = command.get_command(context, rest[0])
        assert found is not None, f"no command {' '.join(words)}"
        command, rest = found, rest[1:]
    return command, rest


def test_commands_in_the_documentation_exist():
    found = list(commands())
    assert len(found) > 30
    for name, words in found:
        command, rest = click_command(words)
        known = {"--help", "-h", "--version"}
        known |= {text for param in command.params for text in param.opts}
        options = [word for word in rest if word.startswith("-")]
        assert set(options) <= known, f"{name}: {' '.join(words)}"
        for option, value in pairwise(rest):
            if option == "--algo" and value.islower() and value != "gossip":
                assert value in STRATEGIES, f"{name}: {' '.join(words)}"


def test_every_command_is_documented():
    called = {words[1] for _, words in commands() if words[0] == "fedmosaic" and len(words) > 1}
    assert set(cli.list_commands(click.Context(cli))) <= called


def test_configuration_page_is_up_to_date():
    hint = "run: fedmosaic config reference > docs/configuration.md"
    assert (DOCS / "configuration.md").read_text() == reference_markdown(), hint


def error_classes() -> dict[str, type[errors.FedMosaicError]]:
    found = {}
    queue = [errors.FedMosaicError]
    while queue:
        kind = queue.pop()
        found[kind.__name__] = kind
        queue += kind.__subclasses__()
    return {name: kind for name, kind in found.items() if kind.__module__ == errors.__name__}


def test_every_error_has_its_section_and_exit_code():
    text = (DOCS / "errors.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n\nExit code (\d+)\.", text, flags=re.MULTILINE))
    expected = {name: str(kind.exit_code) for name, kind in error_classes().items()}
    assert sections == expected
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, flags=re.MULTILINE))
    for name, code in expected.items():
        assert f"`{name}`" in table[code]


def test_the_worked_example_runs(tmp_path, monkeypatch):
    strategy, register, usage = blocks(DOCS / "add-a-strategy.md", "python")
    (tmp_path / "gossip.py").write_text(strategy)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gossip", raising=False)
    monkeypatch.setattr(STRATEGIES, "_targets", dict(STRATEGIES._targets))
    exec(compile(register, "register", "exec"), {})  # noqa: S102 - the documentation's own text
    cls = STRATEGIES["gossip"]
    assert cls.__name__ == "Gossip"
    exec(compile(usage, "usage", "exec"), {"__name__": "usage"})  # noqa: S102
    monkeypatch.delitem(sys.modules, "gossip")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_the_peft_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(DOCS / "adapters.md", "python")
    exec(compile(example, "adapters.md", "exec"), {})  # noqa: S102
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_the_site_builds_strictly(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs and mkdocs-material are not installed (pip install '.[docs]')")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = (site / "index.html").read_text()
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?([^\"\s>]+)", text)
    assert loaded
    assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)]
    shutil.rmtree(site)
