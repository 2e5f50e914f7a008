"""Whole runs as jobs of a real scheduler: they start, stop, go on and end as they should."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from lives import assert_same_run

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.events import RoundFinished
from fedml_plugin_fedmosaic.launch.base import JobStatus, read_record
from fedml_plugin_fedmosaic.launch.status import read_status
from fedml_plugin_fedmosaic.report.records import METRICS_FILE, read_events
from fedml_plugin_fedmosaic.runtime.federation import prepare_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
WAIT_S = 300
CUT_RUN_S = 75
LONG = ("--set", "comm_round=4", "--set", "optim.num_steps=300")
ZERO3 = {"zero_optimization": {"stage": 3}}


def uncut(cluster, name: str, *settings: str) -> Path:
    """The same run in this process, without a scheduler."""
    run_dir = cluster.folder / "runs" / name
    prepare_run(load_experiment(cluster.config, settings), run_dir).execute()
    return run_dir


def nodes_of(log: str) -> str:
    return re.findall(r"start \S+ on (\S+):", log)[-1]


def test_the_hand_run_quickstart(cluster):
    for folder in ("configs", "slurm"):
        shutil.copytree(ROOT / folder, cluster.folder / folder)
    settings = (
        "comm_round=1",
        "optim.num_steps=2",
        "evaluation.others=false",
        "evaluation.base=false",
        "evaluation.compare=[]",
        "data.max_train_samples=8",
        "data.max_test_samples=4",
    )
    changes = [word for setting in settings for word in ("--set", setting)]
    text = cluster.command("sbatch", "--parsable", "slurm/quickstart_cpu.sh", *changes)
    run_dir = cluster.folder / f"runs/quickstart_cpu-{text.strip()}"
    out = cluster.folder / f"quickstart_cpu-{text.strip()}.out"
    for _ in range(WAIT_S):
        if out.exists() and "ended with exit code" in out.read_text():
            break
        cluster.command("sleep", "1")
    log = out.read_text()
    assert "ended with exit code 0" in log
    assert json.loads((run_dir / "summary.json").read_text())
    said = read_status(run_dir)
    assert said is not None
    assert (said.state, said.incarnation) == ("finished", f"{text.strip()}.0")
    assert "group 3" in log  # 4 ranks


def test_a_federation_over_two_nodes_equals_one_process(cluster):
    run_dir = cluster.submit("two", "--nodes", "2", "--ranks", "2")
    assert cluster.job(run_dir).wait(WAIT_S) is JobStatus.COMPLETED, cluster.log(run_dir)
    log = cluster.log(run_dir)
    assert len(set(re.findall(r"\d+", nodes_of(log)))) == 2
    assert "group 1    rank 1" in log
    table = cluster.command(sys.executable, "-m", "fedml_plugin_fedmosaic", "jobs", "runs")
    assert "COMPLETED" in table
    assert_same_run(run_dir, uncut(cluster, "one"))


def test_a_client_sharded_over_two_tasks_as_job_and_as_heterogeneous_job(cluster):
    (cluster.folder / "zero3.json").write_text(json.dumps(ZERO3))
    text = cluster.config.read_text().replace(
        "large: {path: models/large}", "large: {path: models/large, ranks: 2}"
    )
    mixed = cluster.folder / "mixed.yaml"
    mixed.write_text(f"{text}engine_args: {{deepspeed: zero3.json}}\n")
    whole = cluster.submit("whole", "--nodes", "3", "--ranks", "3", config=mixed)
    assert cluster.job(whole).wait(WAIT_S) is JobStatus.COMPLETED, cluster.log(whole)
    parts = cluster.submit("parts", "--heterogeneous", config=mixed)
    assert cluster.job(parts).wait(WAIT_S) is JobStatus.COMPLETED, cluster.log(parts)
    for run_dir in (whole, parts):
        assert re.search(r"group 0 +ranks 0-1: client 1\b", cluster.log(run_dir))
        assert re.search(r"group 1 +rank 2: clients 0, 2\b", cluster.log(run_dir))
    assert "#SBATCH hetjob" in (parts / "job.sbatch").read_text()
    assert_same_run(parts, whole)


def test_a_run_cut_by_its_time_limit_equals_the_uncut_one(cluster):
    # A limit counts in steps of half a minute, so the run must last for some, however fast this
    # machine is just now: more steps until the uncut run lasts long enough to be cut.
    steps, seconds, attempt = 20, 0.0, 0
    while seconds < CUT_RUN_S:
        steps = round(steps * min(40.0, 1.3 * CUT_RUN_S / seconds)) if seconds else steps
        settings = ("comm_round=4", f"optim.num_steps={steps}")
        attempt += 1
        reference = uncut(cluster, f"uncut{attempt}", *settings)
        events = read_events(reference / METRICS_FILE)
        seconds = sum(event.duration_s for event in events if isinstance(event, RoundFinished))
    options = ("--nodes", "2", "--ranks", "2", "--time", "2", "--set", "launcher.signal_s=75")
    changes = [word for setting in settings for word in ("--set", setting)]
    run_dir = cluster.submit("cut", *options, *changes)
    status = cluster.job(run_dir).wait(800)
    log = cluster.log(run_dir)
    assert status is JobStatus.COMPLETED, log
    job_id = read_record(run_dir).ids[0]
    assert log.count("queueing again") >= 1, log
    said = read_status(run_dir)
    assert said is not None
    assert said.state == "finished"
    assert int(said.incarnation.removeprefix(f"{job_id}.")) >= 1
    assert_same_run(run_dir, reference)


def test_cancel(cluster):
    run_dir = cluster.submit("cancelled", "--ranks", "2", *LONG)
    cluster.wait_started(run_dir, f"{read_record(run_dir).ids[0]}.0")
    assert cluster.job(run_dir).status() is JobStatus.RUNNING
    cluster.command(sys.executable, "-m", "fedml_plugin_fedmosaic", "cancel", str(run_dir))
    assert cluster.job(run_dir).wait(60) is JobStatus.CANCELLED
    said = read_status(run_dir)
    assert said is not None
    assert said.state in ("interrupted", "running")  # never finished, never failed


def test_a_run_that_fails_is_failed(cluster):
    run_dir = cluster.submit("broken", "--set", "data.scenario=nowhere")
    assert cluster.job(run_dir).wait(WAIT_S) is JobStatus.FAILED
    said = read_status(run_dir)
    assert said is not None
    assert said.exit_code == 2
    table = cluster.command(sys.executable, "-m", "fedml_plugin_fedmosaic", "jobs", "runs")
    assert "nowhere" in table


def test_ranks_that_do_not_find_each_other_are_an_error(cluster):
    run_dir = cluster.submit("alone", "--ranks", "2", "--mpi", "none")
    assert cluster.job(run_dir).wait(WAIT_S) is JobStatus.FAILED
    log = cluster.log(run_dir)
    assert "launcher and MPI library do not belong together" in log
    assert "srun --mpi=list" in log
    said = read_status(run_dir)
    assert said is not None
    assert said.exit_code == 6


def test_a_preempted_run_goes_on_later(cluster):
    run_dir = cluster.submit("preempted", "--nodes", "2", "--ranks", "2", *LONG)
    job_id = read_record(run_dir).ids[0]
    cluster.wait_started(run_dir, f"{job_id}.0")
    cluster.command(
        *("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--mem=0"),
        *("--output=high.out", "--wrap=sleep 10"),
    )
    cluster.wait_for(lambda: "queueing again" in cluster.log(run_dir), run_dir)
    assert cluster.job(run_dir).status() in (JobStatus.PENDING, JobStatus.RUNNING)
    cluster.wait_started(run_dir, f"{job_id}.1")
    assert cluster.job(run_dir).wait(WAIT_S) is JobStatus.COMPLETED, cluster.log(run_dir)


def test_a_drained_node_ends_no_run_and_a_lost_one_moves_it(cluster):
    run_dir = cluster.submit("moved", "--nodes", "2", "--ranks", "2", *LONG)
    job_id = read_record(run_dir).ids[0]
    cluster.wait_started(run_dir, f"{job_id}.0")
    first = cluster.command("squeue", "--noheader", "--jobs", job_id, "--format=%N").strip()
    lost = cluster.command("scontrol", "show", "hostnames", first).split()[1]
    try:
        update = ("scontrol", "update", f"nodename={lost}", "reason=test")
        cluster.command(*update, "state=drain")
        cluster.command("sleep", "5")
        assert cluster.job(run_dir).status() is JobStatus.RUNNING
        said = read_status(run_dir)
        assert said is not None
        assert said.incarnation == f"{job_id}.0"
        # One round is saved before the node is lost.
        cluster.wait_for(lambda: any(run_dir.glob("checkpoints/*/round-*.json")), run_dir)
        cluster.command(*update, "state=down")
        cluster.wait_started(run_dir, f"{job_id}.1")
        second = cluster.command("squeue", "--noheader", "--jobs", job_id, "--format=%N").strip()
        assert lost not in cluster.command("scontrol", "show", "hostnames", second).split()
        assert cluster.job(run_dir).wait(WAIT_S) is JobStatus.COMPLETED, cluster.log(run_dir)
    finally:
        cluster.command("scontrol", "update", f"nodename={lost}", "state=resume")
    assert_same_run(run_dir, uncut(cluster, "still", "comm_round=4", "optim.num_steps=300"))
