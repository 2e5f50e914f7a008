"""The ``fedml run`` command with the plugin installed, beside the stock command.

Importing FedML takes seconds, so one process with the hook and one without try every command line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core.registry import STRATEGIES

pytestmark = [pytest.mark.fedml, pytest.mark.timeout(600)]

DRIVER = """
import json, sys
if sys.argv[1] == "stock":
    import _fedmosaic_hook
    _fedmosaic_hook.uninstall()
import click.testing
from fedml.cli.cli import cli

calls = []
if sys.argv[1] == "extended":
    import types
    fake = types.ModuleType("fedml_plugin_fedmosaic.cli.run")
    def run_command(**options):
        calls.append({name: str(value) for name, value in options.items()})
        return 7
    fake.run_command = run_command
    sys.modules[fake.__name__] = fake

runner = click.testing.CliRunner()
results = {}
for line in json.loads(sys.argv[2]):
    calls.clear()
    result = runner.invoke(cli, line.split(), prog_name="fedml")
    error = None if isinstance(result.exception, (SystemExit, type(None))) else repr(result.exception)
    results[line] = {
        "code": result.exit_code, "out": result.stdout, "err": result.stderr,
        "calls": list(calls), "error": error,
    }
sys.stdout.write("RESULT" + json.dumps(results))
"""  # noqa: E501

STOCK = [
    "run",
    "run --help",
    "run list --help",
    "run bogus",
    "run -v test",
    "version",
]
OURS = [
    "run --algo FedMosaic --cf my.yaml --backend sp --set train_args.comm_round=2 "
    "--set optim_args.optim.num_steps=3 --run-dir out --dry-run --debug",
    "run --algo local",
    "run --algo local --backend MPI -np 3",
    "run --algo nope",
    "run --algo fedmosaic list",
    "run --cf my.yaml",
    "run --algo fedmosaic -k secret",
    "run --algo fedmosaic -np 2 --backend sp",
]
ALL_OPTIONS = OURS[0]


def _start(kind: str, lines: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, kind, json.dumps(lines)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> tuple[dict, str]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    before, _, text = out.partition("RESULT")
    return json.loads(text), before + err


@pytest.fixture(scope="module")
def both():
    processes = [_start("stock", STOCK), _start("extended", STOCK + OURS)]
    return [_finish(process) for process in processes]


@pytest.fixture(scope="module")
def stock(both):
    return both[0][0]


@pytest.fixture(scope="module")
def extended(both):
    return both[1][0]


@pytest.mark.parametrize("line", [line for line in STOCK if line not in ("run", "run --help")])
def test_stock_command_lines_are_as_without_us(line, stock, extended):
    assert extended[line] == stock[line]


@pytest.mark.parametrize("line", ["run", "run --help"])
def test_help_gains_options_and_loses_nothing(line, stock, extended):
    assert extended[line]["code"] == stock[line]["code"]
    where = "out" if stock[line]["out"] else "err"
    mine, its = extended[line][where].splitlines(), stock[line][where].splitlines()
    for words in (" ".join(its).split(), ["--algo", "--set", "--run-dir", "--dry-run", "-np,"]):
        assert set(words) <= set(" ".join(mine).split())


def test_start_up_is_not_noisier(both):
    (_, stock_noise), (_, our_noise) = both
    assert our_noise == stock_noise


def test_all_options_arrive(extended):
    result = extended[ALL_OPTIONS]
    assert result["code"] == 7
    assert result["calls"] == [
        {
            "algo": "fedmosaic",
            "cf": "my.yaml",
            "backend": "sp",
            "overrides": "('train_args.comm_round=2', 'optim_args.optim.num_steps=3')",
            "run_dir": "out",
            "resume": "None",
            "from_round": "None",
            "ranks": "None",
            "dry_run": "True",
            "debug": "True",
        }
    ]


def test_without_options_everything_is_left_to_the_defaults(extended):
    (call,) = extended["run --algo local"]["calls"]
    assert call["algo"] == "local"
    assert call["cf"] == "None"
    assert call["overrides"] == "()"


def test_the_number_of_ranks_arrives(extended):
    (call,) = extended["run --algo local --backend MPI -np 3"]["calls"]
    assert (call["backend"], call["ranks"]) == ("MPI", "3")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("run --algo nope", f"unknown algorithm 'nope'; known: {', '.join(STRATEGIES)}"),
        ("run --algo fedmosaic list", "--algo cannot be combined with sub-command 'list'"),
        ("run --cf my.yaml", "--cf needs --algo NAME"),
        ("run --algo fedmosaic -k secret", "has no meaning with --algo"),
        ("run --algo fedmosaic -np 2 --backend sp", "-np needs --backend MPI"),
    ],
)
def test_wrong_command_lines(line, text, extended):
    result = extended[line]
    assert result["code"] == 2
    assert result["calls"] == []
    assert text in " ".join(result["err"].split())


def test_the_installed_script(tmp_path):
    script = Path(sys.executable).with_name("fedml")
    if not script.exists():
        pytest.skip(f"no fedml command beside {sys.executable}")
    done = subprocess.run(
        [script, "run", "--algo", "fedmosaic", "--cf", "missing.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=500,
    )
    assert done.returncode == 2
    assert "missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
