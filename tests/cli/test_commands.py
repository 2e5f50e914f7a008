"""The command line: help, errors, exit codes, and what each command prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from fedml_plugin_fedmosaic import __version__
from fedml_plugin_fedmosaic.cli import doctor
from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.core.errors import ClientFailure, FedMosaicError

COMMANDS = [
    "run",
    "compare",
    "bench",
    "adapt",
    "align",
    "export",
    "sweep",
    "collect",
    "submit",
    "jobs",
    "logs",
    "cancel",
    "config check",
    "config show",
    "config schema",
    "config reference",
    "data headroom",
    "models build-quickstart",
    "doctor",
]


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="fedmosaic", catch_exceptions=False)


def installed(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the console script of the installed package."""
    script = Path(sys.executable).with_name("fedmosaic")
    return subprocess.run(
        [str(script), *args], capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A correct file in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("train_args: {comm_round: 3}\n", encoding="utf-8")
    return Path("c.yaml")


def test_help_lists_every_command_and_comes_at_once() -> None:
    began = time.perf_counter()
    done = installed("--help")
    duration_s = time.perf_counter() - began
    assert done.returncode == 0
    for name in {command.split()[0] for command in COMMANDS}:
        assert f"\n  {name} " in done.stdout
    assert duration_s < 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"fedmosaic {command}" in result.stdout
    assert "--debug" in result.stdout
    assert "\\b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_version_and_module_entry(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedml_plugin_fedmosaic", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == f"fedmosaic, version {__version__}"


def test_an_unknown_command_or_option_exits_2() -> None:
    assert invoke("rum").exit_code == 2
    assert invoke("run", "--nope").exit_code == 2
    assert invoke("compare", "--seeds", "0").exit_code == 2


def test_a_mistake_is_one_block_without_traceback(config: Path) -> None:
    config.write_text("adapter_args: {adapter: {rank: -4, alpha: x}}\n")
    done = installed("config", "check", "--cf", "c.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: 2 mistakes",
        "  c.yaml:1: adapter_args.adapter.rank: must be >= 1 (got -4)",
        '  c.yaml:1: adapter_args.adapter.alpha: must be a number (got "x")',
        "  -> 'fedmosaic config reference' explains every key",
    ]


def test_run_reports_a_mistake_like_check_and_leaves_nothing(config: Path, tmp_path: Path) -> None:
    done = installed("run", "--cf", "none.yaml", "--run-dir", "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == ("error: none.yaml: there is no such configuration file")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


def test_debug_shows_the_traceback(config: Path) -> None:
    result = invoke("config", "check", "--cf", str(config), "--set", "rank=0", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: --set rank=0" in result.stderr


def test_check_says_what_the_file_is(config: Path) -> None:
    result = invoke("config", "check", "--cf", str(config), "--algo", "local", "--set", "rank=2")
    assert result.exit_code == 0
    assert result.stdout == "c.yaml: correct (local on quickstart, 3 rounds, backend sp)\n"


def test_show_prints_a_file_that_is_correct_again(config: Path) -> None:
    shown = invoke("config", "show", "--cf", str(config), "--set", "adapter.rank=5").stdout
    assert yaml.safe_load(shown)["adapter_args"]["adapter"]["rank"] == 5
    config.write_text(shown)
    assert invoke("config", "show", "--cf", str(config)).stdout == shown


def test_schema_and_reference() -> None:
    schema = json.loads(invoke("config", "schema").stdout)
    assert "adapter_args" in schema["properties"]
    assert invoke("config", "reference").stdout.startswith("# Configuration\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FedMosaicError("odd", hint="do it"), 1, "error: odd\n  -> do it\n"),
        (ClientFailure(1, 0, "fit", "boom"), 4, "error: client 1, round 1, fit: boom\n"),
        (
            ClientFailure(1, 0, "fit", "boom", hint="do it"),
            4,
            "error: client 1, round 1, fit: boom\n  -> do it\n",
        ),
        (KeyboardInterrupt(), 130, "stopped by the user\n"),
    ],
)
def test_exit_codes(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("fedml_plugin_fedmosaic.config.loader.load_experiment", broken)
    for command in (["config", "check"], ["run"]):
        result = invoke(*command, "--cf", str(config))
        assert (result.exit_code, result.stderr) == (code, text)


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fedml_plugin_fedmosaic.config.loader.load_experiment", broken)
    result = invoke("run", "--cf", str(config))
    assert result.exit_code == 1
    assert "ZeroDivisionError: oops" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: this is a bug of fedml-plugin-fed")


def test_a_note_of_an_error_is_shown(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        error = FedMosaicError("odd")
        error.add_note("client 2, round 3, fit")
        raise error

    monkeypatch.setattr("fedml_plugin_fedmosaic.config.loader.load_experiment", broken)
    assert invoke("run").stderr == "error: odd\n  client 2, round 3, fit\n"


def test_doctor_names_everything_and_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "x").write_bytes(b"0" * 2048)
    done = installed("doctor", env={**os.environ, "FEDMOSAIC_CACHE": str(cache)})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("python", "fedml", "torch", "MPI", "pins", "fedml run --algo"):
        assert f"\n{name} " in f"\n{done.stdout}"
    assert f"{cache} (2.0 KiB)" in done.stdout
    assert "as required" in done.stdout


def test_doctor_finds_a_wrong_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "2.1.0", "chardet": "missing"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name) or real(name))
    assert doctor.pin_conflicts() == [
        "chardet missing, needs <6,>=5",
        "numpy 2.1.0, needs <2,>=1.26",
    ]
    ask = ("import sys; sys.exit('no MPI here')", "import time; time.sleep(30)")
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 1)
    assert doctor._ask(ask[0]) == (False, "no MPI here")
    assert doctor._ask(ask[1]) == (False, "no answer in 1 s")
