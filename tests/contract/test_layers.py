"""What importing a pure layer does not load; sizes of files and functions; what is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fedml_plugin_fedmosaic
from fedml_plugin_fedmosaic.config.loader import bundled_config

PACKAGE = Path(fedml_plugin_fedmosaic.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
HEAVY = {"fedml", "mpi4py", "transformers", "peft", "deepspeed", "submitit", "rich", "click"}

PROBE = """
import sys
from importlib import import_module
for name in {modules!r}:
    import_module(name)
print(" ".join(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level names in ``sys.modules`` after importing ``modules`` in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(modules=modules)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.split())


def modules_of(*layers: str) -> list[str]:
    found = [path for layer in layers for path in (PACKAGE / layer).rglob("*.py")]
    names = [path.relative_to(PACKAGE.parent).with_suffix("") for path in found]
    return sorted(".".join(name.parts).removesuffix(".__init__") for name in names)


@pytest.mark.parametrize(
    ("layers", "allowed"),
    [
        (("core", "equations", "strategies"), set()),
        (("config",), set()),
        (("comm", "launch"), set()),
    ],
    ids=["pure", "config", "comm"],
)
def test_a_layer_loads_nothing_heavy(layers: tuple[str, ...], allowed: set[str]) -> None:
    modules = modules_of(*layers)
    assert len(modules) > 2
    assert loaded_by(modules) & (HEAVY - allowed) == set()


def test_the_command_starts_without_torch() -> None:
    loaded = loaded_by(["fedml_plugin_fedmosaic", "fedml_plugin_fedmosaic.cli.main"])
    assert loaded & {"torch", "numpy", "pydantic", "yaml", "rich", "fedml"} == set()


def test_looking_at_a_model_needs_no_peft() -> None:
    """PEFT takes seconds, most of them for bitsandbytes, which it imports where it is installed."""
    loaded = loaded_by(["fedml_plugin_fedmosaic.adapters.structure"])
    assert "torch" in loaded
    assert loaded & {"peft", "bitsandbytes", "transformers"} == set()


def test_a_plain_import_loads_nothing_but_itself() -> None:
    extra = loaded_by(["fedml_plugin_fedmosaic"]) - loaded_by(["importlib", "typing"])
    assert {name for name in extra if not name.startswith("_")} == {"fedml_plugin_fedmosaic"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert too_long == {}


def test_public_names_exist_and_are_listed() -> None:
    for name in fedml_plugin_fedmosaic.__all__:
        assert getattr(fedml_plugin_fedmosaic, name) is not None, name
        assert name in dir(fedml_plugin_fedmosaic)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fedml_plugin_fedmosaic.no_such_name


def test_the_version_is_written_once() -> None:
    installed = metadata.version("fedml-plugin-fedmosaic")
    assert fedml_plugin_fedmosaic.__version__ == installed


def test_the_installation_carries_the_hook_and_the_configurations() -> None:
    files = [str(path) for path in metadata.files("fedml-plugin-fedmosaic") or ()]
    assert "fedml_plugin_fedmosaic.pth" in files
    assert bundled_config().name == "quickstart.yaml"
    assert loaded_by(["site"]) >= {"_fedmosaic_hook"}
    assert not any(path.endswith("bin/fedml") for path in files)
