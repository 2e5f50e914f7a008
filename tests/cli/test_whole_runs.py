"""Whole runs of a tiny federation through the command: run, compare, export, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.cli.run import run_command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def cf(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny experiment; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return str(world / "tiny.yaml")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def test_a_dry_run_describes_and_writes_nothing(cf: str, tmp_path: Path) -> None:
    result = invoke("run", "--cf", cf, "--dry-run", "--algo", "local")
    assert result.exit_code == 0, result.stderr
    assert "strategies      local\n" in result.stdout
    assert "client 1        large: Pets1-0\n" in result.stdout
    assert "nothing was trained" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_ends_in_a_table_and_a_folder_that_is_never_overwritten(
    cf: str, tmp_path: Path
) -> None:
    arguments = ["run", "--cf", cf, "--run-dir", "out", "--set", "evaluation.compare=[local]"]
    result = invoke(*arguments, "--set", "run.tensorboard=true")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(" round " in line for line in lines) == 4
    assert max(map(len, lines)) <= 100
    for start in (" 0 ", " 1 ", " 2 ", " mean ", " worst client "):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1] == f"report   {Path('out/report.html')}"
    assert (tmp_path / "out/report.html").stat().st_size > 1000
    assert list((tmp_path / "out/tensorboard").iterdir()) != []
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert written["eval_args"]["evaluation"]["compare"] == ["local"]
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "never overwritten" in again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapter.rank=1000", "rank"),
        ("adapter.num_blocks=99", "block"),
        ("models.small.path=/no/such/model", "/no/such/model"),
        ("data.root=/no/such/data", "/no/such/data"),
        ("data.scenario=none.json", "none.json"),
        ("client_num_in_total=7", "has 3 clients"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    cf: str, tmp_path: Path, change: str, message: str
) -> None:
    result = invoke("run", "--cf", cf, "--set", change)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_fedml_door_gets_an_exit_code_not_an_exception(
    cf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_command(algo="local", cf=cf, overrides=["comm_round=1"], run_dir=tmp_path / "door")
    assert code == 0
    assert f"report   {tmp_path / 'door/report.html'}" in capsys.readouterr().out
    assert run_command(cf=cf, overrides=["adapter.rank=0"]) == 2
    assert "must be >= 1" in capsys.readouterr().err


def test_export_writes_an_adapter_folder(cf: str, tmp_path: Path) -> None:
    run = invoke("run", "--cf", cf, "--run-dir", "out", "--set", "comm_round=1")
    assert run.exit_code == 0, run.stderr
    result = invoke("export", "out", "--client", "1", "--out", "adapter")
    assert result.exit_code == 0, result.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    assert invoke("export", "out", "--client", "9", "--out", "other").exit_code == 2
    assert invoke("export", "nowhere", "--client", "0", "--out", "other").exit_code == 2


def test_headroom_measures_every_task_and_model_with_as_many_steps_as_asked(
    cf: str, tmp_path: Path
) -> None:
    arguments = ["data", "headroom", "--cf", cf, "--set", "learning_rate=0.05"]
    short, long = (invoke(*arguments, "--steps", steps) for steps in ("1", "12"))
    assert (short.exit_code, long.exit_code) == (0, 0), short.stderr + long.stderr
    # The paragraph may be wrapped at the terminal's width.
    assert "lora on all of them, 12 steps;" in " ".join(long.stdout.lower().split())
    rows = {line.split()[0]: line.split()[1:] for line in long.stdout.splitlines() if line.strip()}
    tasks = [name for name in rows if name.startswith("Pets")]
    assert len(tasks) == 3
    for name in (*tasks, "mean"):
        numbers = [float(text) for text in rows[name] if "." in text]
        # Majority; blind, base and central of the small and of the large model.
        assert len(numbers) == 7
        assert all(0 <= number <= 100 for number in numbers)
    assert short.stdout.split("mean")[1] != long.stdout.split("mean")[1]
    assert invoke(*arguments, "--steps", "0").exit_code == 2
    assert list(tmp_path.iterdir()) == []
