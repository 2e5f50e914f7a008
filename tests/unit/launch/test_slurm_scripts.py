"""Rendered batch scripts: recorded texts, hand-run scripts, and what the shell does with them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from fedml_plugin_fedmosaic.launch.base import Component, JobSpec, Resources
from fedml_plugin_fedmosaic.launch.recipes import RECIPES, render_recipe
from fedml_plugin_fedmosaic.launch.slurm_script import memory_text, render_job, time_text

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "slurm"
BODY = "export OMP_NUM_THREADS="
GPU = Resources(
    nodes=2,
    ntasks=8,
    ntasks_per_node=4,
    cpus_per_task=8,
    gpus_per_node=4,
    mem_gib=100,
    time_min=36 * 60,
    partition="gpu",
    account="me",
    constraint="a100&ib",
    extra={"exclude": "n7"},
)


def spec_of(name: str = "large", **changes: object) -> JobSpec:
    folder = Path("/shared/runs") / name
    values = {
        "name": name,
        "command": ("python3", "-m", "pkg", "run", "--cf", f"{folder}/submitted.yaml"),
        "resume_command": ("python3", "-m", "pkg", "run", "--resume", str(folder)),
        "run_dir": folder,
        "resources": GPU,
        "setup": ("module load openmpi", 'source "$HOME/env/bin/activate"'),
        "environment": {"NCCL_DEBUG": "WARN", "NOTE": "two words"},
    }
    return JobSpec(**{**values, **changes})


COMPONENTS = (
    Component(name="8B", resources=Resources(nodes=1, ntasks=4, gpus_per_node=4, time_min=60)),
    Component(name="1B", resources=Resources(nodes=1, ntasks=1, gpus_per_node=1, time_min=60)),
)
TEXTS = {
    "job": lambda: render_job(spec_of()),
    "chain": lambda: render_job(spec_of(chain=3, requeue=False)),
    "heterogeneous": lambda: render_job(spec_of(components=COMPONENTS)),
    "array": lambda: render_job(spec_of("a"), array=[spec_of("a"), spec_of("b c")], max_parallel=1),
}


@pytest.mark.parametrize("name", TEXTS)
def test_recorded_scripts(name):
    # To record a change: write TEXTS[name]() into the file and read the difference.
    assert TEXTS[name]() == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_hand_run_scripts_are_what_the_launcher_renders(name):
    hint = "run: fedmosaic submit --scripts ."
    assert (ROOT / "slurm" / f"{name}.sh").read_text() == render_recipe(name, ROOT / "configs"), (
        hint
    )


def test_every_script_has_the_same_body():
    bodies = set()
    for path in [*(ROOT / "slurm").glob("*.sh"), *GOLDEN.glob("*.sbatch")]:
        body = path.read_text().partition(BODY)[2]
        for groups in ("0-1", "0-2"):
            body = body.replace(f" --het-group={groups}", "")
        bodies.add(body)
    assert len(bodies) == 1


def test_no_script_is_forgotten():
    assert {path.stem for path in (ROOT / "slurm").iterdir()} == set(RECIPES)
    assert all(os.access(path, os.X_OK) for path in (ROOT / "slurm").iterdir())


@pytest.mark.parametrize(
    ("minutes", "text"), [(1, "00:01:00"), (90, "01:30:00"), (1440, "1-00:00:00")]
)
def test_times(minutes, text):
    assert time_text(minutes) == text


def test_memory():
    assert (memory_text(4), memory_text(0.5)) == ("4G", "512M")


# What the shell does: the script runs under bash with fakes of srun, scontrol and sleep.


class Shell:
    """Runs a job's script as Slurm would."""

    def __init__(self, tmp_path: Path) -> None:
        self.fake = FakeSlurm(tmp_path / "bin")
        self.run_dir = tmp_path / "run"
        self.run_dir.mkdir()

    def run(self, program: str, **variables: str) -> tuple[int, str]:
        """Exit code and output of a job whose ranks run a shell program."""
        spec = spec_of(
            run_dir=self.run_dir,
            command=("bash", "-c", program, "start"),
            resume_command=("bash", "-c", f"echo resumed; {program}", "resume"),
            resources=Resources(nodes=1, ntasks=1),
            setup=(),
            mpi="none",
        )
        done = subprocess.run(
            ["bash", "-c", render_job(spec)],
            capture_output=True,
            text=True,
            timeout=60,
            env={
                "PATH": self.fake.path,
                "SLURM_JOB_ID": "12",
                "RUN": str(self.run_dir),
                **variables,
            },
        )
        return done.returncode, done.stdout + done.stderr

    def says(self, state: str, incarnation: str) -> None:
        """As the run would write it."""
        text = json.dumps({"state": state, "incarnation": incarnation}, indent=1)
        (self.run_dir / "status.json").write_text(text)


def word(state: str, incarnation: str) -> str:
    """Shell text that writes the run's own word."""
    text = f'"state": "{state}",\\n"incarnation": "{incarnation}"\\n'
    return f"printf '{text}' > \"$RUN/status.json\"; "


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_exit_code_of_the_ranks_is_the_jobs(shell):
    assert shell.run("exit 3")[0] == 3
    assert shell.run("exit 0")[0] == 0
    assert shell.fake.calls("scontrol") == []
    assert "--kill-on-bad-exit=1" in shell.fake.calls("srun")[0]


def test_an_interrupted_run_is_queued_again(shell):
    program = word(state="interrupted", incarnation="12.0") + "exit 75"
    code, _ = shell.run(program)
    assert code == 75
    assert shell.fake.calls("scontrol") == ["scontrol requeue 12"]


def test_a_rank_killed_while_the_others_stop_does_not_matter(shell):
    shell.run(word(state="interrupted", incarnation="12.0") + "exit 137")
    assert shell.fake.calls("scontrol") == ["scontrol requeue 12"]


def test_the_word_of_an_older_start_is_not_taken(shell):
    shell.says("interrupted", "12.0")
    code, _ = shell.run("exit 1", SLURM_RESTART_COUNT="1")
    assert code == 1
    assert shell.fake.calls("scontrol") == []


def test_a_started_run_goes_on(shell):
    assert "resumed" not in shell.run("true")[1].partition("\n")[2]
    (shell.run_dir / "config.yaml").touch()
    assert "resumed" in shell.run("true")[1].partition("\n")[2]


def test_a_finished_run_is_left_alone(shell):
    shell.says("finished", "11.0")
    code, output = shell.run("exit 9")
    assert code == 0
    assert "nothing to do" in output
    assert shell.fake.calls("srun") == []


def test_a_chain_ends_with_a_failure_and_a_new_job_does_not(shell):
    shell.says("failed", "11.0")
    assert shell.run("exit 0", FEDMOSAIC_CHAINED="1")[0] == 1
    assert shell.fake.calls("srun") == []
    assert shell.run("exit 0")[0] == 0


def test_a_failed_run_fails_the_job_whatever_the_launcher_says(shell):
    code, _ = shell.run(word(state="failed", incarnation="12.0") + "exit 0")
    assert code == 1


def test_the_signal_reaches_the_ranks_and_the_job_waits_for_them(shell):
    program = (
        'trap "told=1" USR1; kill -USR1 $(ps -o ppid= -p $$); '
        "for i in 1 2 3 4 5; do /bin/sleep 0.2; done; "
        'test -n "$told"; ' + word(state="interrupted", incarnation="12.0")
    )
    code, output = shell.run(program + "exit 75")
    assert "told to stop" in output
    assert code == 75
    assert shell.fake.calls("scontrol") == ["scontrol requeue 12"]


def test_a_signal_before_a_rank_listens_loses_nothing(shell):
    code, _ = shell.run("kill -USR1 $(ps -o ppid= -p $$); exec /bin/sleep 20")
    assert code == 138
    assert shell.fake.calls("scontrol") == ["scontrol requeue 12"]


def test_mpirun_instead_of_srun(shell, tmp_path):
    spec = spec_of(run_dir=tmp_path, mpi="mpirun")
    assert "MPI=mpirun\n" in render_job(spec)
