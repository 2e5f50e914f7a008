"""Batch scripts of Slurm as text; the same body for submitted and for hand-run ones.

A script starts the ranks, forwards "stop soon" to all of them, and looks at what the run says of
itself when they have ended: ``interrupted`` puts the job back into the queue, where its next
incarnation goes on from the run folder. The exit code of ``srun`` would not do: it is that of
whichever rank ended first or was killed last.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.base import LOG_FOLDER, STARTED_FILE, JobSpec, Resources

MPI_HINT = "what 'srun --mpi=list' offers: pmix, pmi2, cray_shasta; or mpirun; none for one rank"

_BODY = """\

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# srun no longer takes the cores per task from sbatch (since Slurm 22.05).
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# mpirun gives its ranks a terminal, whatever their output goes to.
export PYTHONUNBUFFERED=1 TTY_COMPATIBLE="${TTY_COMPATIBLE:-0}"
# Compute nodes may have no internet: what is not in the cache is an error at once, not a wait.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# Every start of this job has a name; what an older start says of itself is never taken for news.
job="$SLURM_JOB_ID"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
export FEDMOSAIC_INCARNATION="$job.${SLURM_RESTART_COUNT:-0}"
says() { grep -qs "\\"state\\": \\"$1\\"" "$RUN_DIR/status.json"; }
of_this_start() { grep -qsF "\\"$FEDMOSAIC_INCARNATION\\"" "$RUN_DIR/status.json"; }

if says finished; then
  echo "$RUN_DIR is finished: nothing to do"
  exit 0
fi
if [[ -n ${FEDMOSAIC_CHAINED:-} ]] && says failed; then
  echo "$RUN_DIR has failed: the chain ends here"
  exit 1
fi
if [[ -e $RUN_DIR/@STARTED@ ]]; then command=("${go_on[@]}"); else command=("${start[@]}"); fi

if [[ $MPI == mpirun ]]; then
  ranks=(mpirun -n "${SLURM_NTASKS:-1}")
else
  ranks=(srun --mpi="$MPI" --label --kill-on-bad-exit=1@HET@)
fi

# Near the time limit, and when preempted, Slurm signals this script: all ranks save and stop.
told=no
stop() {
  told=yes
  echo "$(date +%T) told to stop: the ranks save their state"
  kill -USR1 "$ranks_pid" || true
}
trap stop USR1
echo "$(date +%T) start $FEDMOSAIC_INCARNATION on ${SLURM_JOB_NODELIST:-?}: ${command[*]}"
"${ranks[@]}" "${command[@]}" &
ranks_pid=$!
while kill -0 "$ranks_pid" 2>/dev/null; do wait "$ranks_pid" || true; done
wait "$ranks_pid" && code=0 || code=$?
trap - USR1
echo "$(date +%T) the ranks of $FEDMOSAIC_INCARNATION ended with exit code $code"

again=no
if says interrupted && of_this_start; then again=yes; fi
# Told before every rank could listen: killed by the signal, back at the last checkpoint.
if [[ $told == yes ]] && ((code > 128)); then again=yes; fi
if [[ $again == yes ]] && ((REQUEUE && ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
  echo "queueing again"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # Slurm ends this script; its own exit code would end the job
fi
if says failed && of_this_start && ((code == 0)); then code=1; fi
exit "$code"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A batch script in parts.

    Attributes:
        title: comment lines below the first line, without ``#``.
        directives: ``#SBATCH`` options per component, by long name; one entry if homogeneous.
        block: what a user edits, or the launcher's own variables: shell lines.
        target: shell lines that define ``RUN_DIR`` and the arrays ``start`` and ``go_on``.
        optional: options shown as comments, for a user to fill.
    """

    title: Sequence[str]
    directives: Sequence[Mapping[str, str | None]]
    block: Sequence[str]
    target: Sequence[str]
    optional: Mapping[str, str] = field(default_factory=dict)


def render(script: Script) -> str:
    """The script's text."""
    lines = ["#!/bin/bash", *(f"# {line}".rstrip() for line in script.title)]
    for number, options in enumerate(script.directives):
        if number:
            lines.append("#SBATCH hetjob")
        lines += [_directive(name, value) for name, value in options.items()]
        lines += [f"##SBATCH --{name}={value}" for name, value in script.optional.items()]
    lines += ["", *script.block, "", "set -euo pipefail", *script.target]
    het = ""
    if len(script.directives) > 1:
        het = f" --het-group=0-{len(script.directives) - 1}"
    body = _BODY.replace("@STARTED@", STARTED_FILE).replace("@HET@", het)
    return "\n".join(lines) + "\n" + body


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={shlex.quote(value)}"


def resource_options(resources: Resources) -> dict[str, str | None]:
    """Resources as ``sbatch`` options by long name, in a fixed order."""
    options: dict[str, str | None] = {"nodes": str(resources.nodes)}
    numbers = (
        ("ntasks", resources.ntasks),
        ("ntasks-per-node", resources.ntasks_per_node),
        ("cpus-per-task", resources.cpus_per_task),
        ("gpus-per-node", resources.gpus_per_node or None),
    )
    options.update({name: str(value) for name, value in numbers if value is not None})
    if resources.mem_gib is not None:
        options["mem"] = memory_text(resources.mem_gib)
    if resources.time_min is not None:
        options["time"] = time_text(resources.time_min)
    words = (
        ("partition", resources.partition),
        ("account", resources.account),
        ("qos", resources.qos),
        ("constraint", resources.constraint),
    )
    options.update({name: value for name, value in words if value is not None})
    options.update(resources.extra)
    return options


def job_options(name: str, output: str, *, requeue: bool, signal_s: int) -> dict[str, str | None]:
    """Options that every job of ours has."""
    return {
        "job-name": name,
        "output": output,
        "open-mode": "append",
        ("requeue" if requeue else "no-requeue"): None,
        "signal": f"B:USR1@{signal_s}",
    }


def render_job(spec: JobSpec, *, array: Sequence[JobSpec] = (), max_parallel: int = 1) -> str:
    """The script of a job, of a heterogeneous job, or of an array of jobs.

    Args:
        spec: the job; of an array the first element.
        array: all elements, of equal resources.
        max_parallel: elements that may run at once.

    Raises:
        LaunchError: elements of an array differ in more than their command and folder.
    """
    log = "%A_%a.out" if array else "%j.out"
    folder = spec.run_dir / LOG_FOLDER
    options = job_options(
        spec.name,
        str(folder.absolute() / log),
        requeue=spec.requeue,
        signal_s=spec.signal_s,
    )
    if array:
        options["array"] = f"0-{len(array) - 1}%{max(1, min(max_parallel, len(array)))}"
    parts = spec.components
    first = parts[0].resources if parts else spec.resources
    directives = [{**options, **resource_options(first)}]
    directives += [resource_options(part.resources) for part in parts[1:]]
    block = [
        *spec.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in spec.environment.items()),
        f"MPI={shlex.quote(spec.mpi)}",
        f"REQUEUE={int(spec.requeue and spec.chain == 1)} MAX_RESTARTS=100",
    ]
    title = [f"{spec.name}: written by 'fedmosaic submit', started by sbatch."]
    target = _array_target(array) if array else _target(spec)
    return render(Script(title=title, directives=directives, block=block, target=target))


def _target(spec: JobSpec, indent: str = "") -> list[str]:
    go_on = spec.resume_command or spec.command
    return [
        f"{indent}RUN_DIR={shlex.quote(str(spec.run_dir.absolute()))}",
        f"{indent}start=({shlex.join(spec.command)})",
        f"{indent}go_on=({shlex.join(go_on)})",
    ]


def _array_target(array: Sequence[JobSpec]) -> list[str]:
    first = array[0]
    for spec in array:
        same = (
            spec.resources == first.resources
            and not spec.components
            and spec.setup == first.setup
            and dict(spec.environment) == dict(first.environment)
            and spec.mpi == first.mpi
        )
        if not same:
            raise LaunchError(
                f"jobs {first.name!r} and {spec.name!r} of one array differ in more than their "
                "command and folder",
                hint="submit jobs of different resources as arrays of their own",
            )
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, spec in enumerate(array):
        lines += [f"  {number})", *_target(spec, "    "), "    ;;"]
    return [
        *lines,
        "esac",
        f'exec >>"$RUN_DIR/{LOG_FOLDER}/$SLURM_ARRAY_JOB_ID"_{"$"}{{SLURM_ARRAY_TASK_ID}}.out 2>&1',
    ]


def memory_text(gib: float) -> str:
    """``sbatch --mem``: whole GiB, or MiB."""
    return f"{int(gib)}G" if gib == int(gib) else f"{round(gib * 1024)}M"


def time_text(minutes: int) -> str:
    """``sbatch --time`` as ``[days-]hours:minutes:00``."""
    days, rest = divmod(minutes, 24 * 60)
    hours, left = divmod(rest, 60)
    text = f"{hours:02d}:{left:02d}:00"
    return f"{days}-{text}" if days else text
