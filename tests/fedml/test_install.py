"""The start-up hook in real wheels and editable installs, and what an uninstall leaves."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import importlib.util, sys
active = any(type(finder).__name__ == "FedMosaicFinder" for finder in sys.meta_path)
spec = importlib.util.find_spec("fedml_plugin_fedmosaic")
print(active, bool(spec and spec.origin), importlib.util.find_spec("fedml") is not None)
"""


def call(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A virtual environment with a part of this one's FedML and nothing else."""
    pytest.importorskip("hatchling", reason="the wheel is built without the network: hatchling")
    if not (ROOT / "fedml_plugin_fedmosaic").is_dir():
        pytest.skip("the tests do not lie in a source tree")
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python3*/site-packages"))
    outer = Path(importlib.util.find_spec("fedml").origin).parents[1]
    for path in [outer / "fedml/cli", *outer.glob("fedml-*.dist-info")]:
        shutil.copytree(path, site / path.relative_to(outer))
    shutil.copy(outer / "fedml/__init__.py", site / "fedml")
    return folder / "bin/python"


def pip(python: Path, *arguments: str | Path) -> None:
    call(sys.executable, "-m", "pip", "--python", python, *arguments)


def files_beside_us(python: Path) -> dict[str, bytes]:
    site = next(python.parents[1].glob("lib/python3*/site-packages"))
    files = (path for path in site.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(site)): path.read_bytes() for path in files}


def build(kind: str, folder: Path) -> Path:
    """What pip asks the build backend for: a wheel, or the small wheel of an editable install."""
    code = f"import sys; from hatchling.build import build_{kind} as b; b(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(python, tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_hook_at_its_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"_fedmosaic_hook.py", "fedml_plugin_fedmosaic.pth"} <= set(names)
    text = zipfile.ZipFile(wheel).read("fedml_plugin_fedmosaic.pth").decode()
    assert text == "import _fedmosaic_hook; _fedmosaic_hook.install()\n"
    points = next(name for name in names if name.endswith("entry_points.txt"))
    scripts = zipfile.ZipFile(wheel).read(points).decode()
    assert "fedml =" not in scripts


@pytest.mark.parametrize("editable", [False, True])
def test_install_and_uninstall(editable, python, wheel, tmp_path):
    before = files_beside_us(python)
    assert call(python, "-I", "-c", PROBE).split() == ["False", "False", "True"]
    what = build("editable", tmp_path) if editable else wheel
    pip(python, "install", "--no-deps", "--no-index", "--quiet", what)
    assert call(python, "-I", "-c", PROBE).split() == ["True", "True", "True"]
    assert call(python, "-I", "-S", "-c", "import sys; print(len(sys.meta_path))").strip() == "3"
    pip(python, "uninstall", "--yes", "--quiet", "fedml-plugin-fedmosaic")
    assert call(python, "-I", "-c", PROBE).split() == ["False", "False", "True"]
    assert files_beside_us(python) == before
