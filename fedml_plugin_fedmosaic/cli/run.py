"""``fedmosaic run``; also what ``fedml run --algo NAME`` calls."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedml_plugin_fedmosaic.cli.errors import exit_code_of
from fedml_plugin_fedmosaic.cli.estimate import Assumptions, estimate_options, lines_of
from fedml_plugin_fedmosaic.cli.options import config_options, debug_option, strategy_options

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.config.sections import Experiment
    from fedml_plugin_fedmosaic.core.events import EventSink
    from fedml_plugin_fedmosaic.launch.topology import Topology
    from fedml_plugin_fedmosaic.runtime.federation import PreparedRun, RunSummary
    from fedml_plugin_fedmosaic.runtime.hooks import RoundHooks

HooksFactory = Callable[["Experiment"], "RoundHooks | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """How a run is prepared, beside its configuration."""

    ranks: int | None = None
    resume: bool = False
    from_round: int | None = None


@click.command()
@config_options
@strategy_options
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the results; must not exist or be empty. A new one under runs/ by default.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN_DIR",
    help="Go on with an interrupted run, with its own configuration; on any number of ranks.",
)
@click.option(
    "--from-round",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --resume: go on after round N and forget what came later.",
)
@click.option(
    "-np",
    "--ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Start N MPI ranks on this machine (backend MPI).",
)
@click.option("--dry-run", is_flag=True, help="Load and check everything, print the plan, stop.")
@estimate_options
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    *,
    cf: Path | None,
    overrides: tuple[str, ...],
    algo: str | None,
    backend: str | None,
    run_dir: Path | None,
    resume: Path | None,
    from_round: int | None,
    ranks: int | None,
    dry_run: bool,
    estimate: bool,
    gpu_tflops: float | None,
    sample_tokens: int | None,
) -> None:
    """Train a federation, evaluate it and print its table.

    Writes a run folder with metrics.jsonl, checkpoints, the resolved config.yaml and report.html.

    \b
    Examples:
      fedmosaic run                                    the bundled quickstart
      fedmosaic run --dry-run                          what it would do
      fedmosaic run --estimate --cf big.yaml           memory and time, before anything is fetched
      fedmosaic run --algo fedavg --set comm_round=2   another strategy, fewer rounds
      fedmosaic run --cf mine.yaml --run-dir runs/a    your own experiment
      fedmosaic run --backend MPI -np 4                clients spread over 4 processes
      mpiexec -n 4 fedmosaic run --backend MPI         the same, started by yourself
      fedmosaic run --resume runs/a                    go on where a run was interrupted
    """
    settings = ctx.obj
    ctx.exit(
        run_command(
            algo=algo,
            cf=cf,
            backend=backend,
            overrides=overrides,
            run_dir=run_dir,
            resume=resume,
            from_round=from_round,
            ranks=ranks,
            dry_run=dry_run,
            estimate=estimate,
            assumptions=Assumptions(tflops=gpu_tflops, sample_tokens=sample_tokens),
            debug=bool(settings and settings.debug),
        )
    )


def run_command(
    *,
    algo: str | None = None,
    cf: Path | str | None = None,
    backend: str | None = None,
    overrides: Sequence[str] = (),
    run_dir: Path | str | None = None,
    resume: Path | str | None = None,
    from_round: int | None = None,
    ranks: int | None = None,
    dry_run: bool = False,
    estimate: bool = False,
    assumptions: Assumptions | None = None,
    debug: bool = False,
    hooks: HooksFactory | None = None,
) -> int:
    """Runs an experiment from its configuration to the printed table.

    Args:
        algo: overrides the configuration's strategy.
        cf: configuration file; the bundled quickstart when None.
        backend: overrides the configuration's backend.
        overrides: ``section.key=value`` texts.
        run_dir: folder for the results.
        resume: folder of a run to go on with; then only what does not change results may differ.
        from_round: with ``resume``: rounds to keep, of the strategy that is not finished.
        ranks: start the same run on so many MPI ranks of this machine and wait for it; with
            ``dry_run`` none is started. None: the ranks that are there.
        dry_run: only load, check and describe.
        estimate: only say what the run would ask for; nothing is loaded.
        assumptions: of the estimate that this or ``dry_run`` prints.
        debug: show tracebacks of expected errors.
        hooks: makes the host framework's hooks; by default FedML's own, for differential privacy.

    Returns:
        Exit code of the process: 0, 75 after SIGTERM or SIGUSR1 (everything is saved: resume the
        run), 130 after Ctrl-C, or that of the error's class. Errors are printed, not raised. In an
        MPI job with several ranks an error ends the whole job.
    """
    from fedml_plugin_fedmosaic.launch.env import end_job, mpi_world, world
    from fedml_plugin_fedmosaic.launch.mpiexec import run_ranks

    rank, size = mpi_world()
    try:
        _check_resume(run_dir, resume, from_round)
        if ranks is not None:
            _check_ranks(backend)
        if ranks is not None and not (dry_run or estimate):
            arguments = _rank_arguments(algo, cf, overrides, run_dir, debug=debug)
            return run_ranks(ranks, [*arguments, *_resume_arguments(resume, from_round)])
        experiment = _load(algo, cf, backend if ranks is None else "MPI", overrides, resume)
        if estimate:
            if rank == 0:
                _print_estimate(lines_of(experiment, ranks, assumptions))
            return 0
        if experiment.comm.backend == "sp":
            world("sp")  # before the slow imports
        chosen = run_dir if resume is None else resume
        folder = None if chosen is None else Path(chosen)
        options = _Options(resume=resume is not None, from_round=from_round)
        if dry_run:
            if rank == 0:
                planned = replace(options, ranks=ranks or size)
                _dry_run(experiment, folder, hooks, planned, assumptions)
            return 0
        prepare = _preparation(experiment, folder, hooks, options)
        summary = _execute(prepare, quiet=rank > 0)
        if rank == 0:
            _conclude(summary)
    except (Exception, KeyboardInterrupt) as error:
        if rank > 0 and getattr(error, "everywhere", False):
            # Rank 0 has the same error, says so and ends the job.
            return getattr(error, "exit_code", 1)
        if rank > 0:
            click.echo(f"[rank {rank}]", err=True)
        code = exit_code_of(error, debug=debug)
        _note_failure(None if dry_run else resume or run_dir, code, error)
        end_job(code)
        return code
    return 0


def _print_estimate(lines: Sequence[tuple[str, str]]) -> None:
    _print_lines(lines)
    click.echo("nothing was loaded or trained (--estimate)")


def _dry_run(
    experiment: Experiment,
    folder: Path | None,
    hooks: HooksFactory | None,
    options: _Options,
    assumptions: Assumptions | None,
) -> None:
    """Loads and checks everything, and says what would run."""
    prepared = _preparation(experiment, folder, hooks, options)(())
    clients = [(client.client_id, client.model_id) for client in prepared.data.clients]
    _describe(prepared, lines_of(experiment, options.ranks, assumptions, clients))


def _resume_arguments(resume: Path | str | None, from_round: int | None) -> list[str]:
    """The options of a rank that goes on with a run."""
    options = (("--resume", resume), ("--from-round", from_round))
    return [word for name, value in options if value is not None for word in (name, str(value))]


def _check_ranks(backend: str | None) -> None:
    from fedml_plugin_fedmosaic.core.errors import ConfigError

    if backend is not None and backend.lower() != "mpi":
        raise ConfigError(
            f"-np starts MPI ranks, but the backend is {backend}", hint="say --backend MPI"
        )


def _rank_arguments(
    algo: str | None,
    cf: Path | str | None,
    overrides: Sequence[str],
    run_dir: Path | str | None,
    *,
    debug: bool,
) -> list[str]:
    """The same command line for one rank."""
    arguments = ["run", "--backend", "MPI"]
    for option, value in (("--algo", algo), ("--cf", cf), ("--run-dir", run_dir)):
        if value is not None:
            arguments += [option, str(value)]
    for text in overrides:
        arguments += ["--set", text]
    return [*arguments, "--debug"] if debug else arguments


def _check_resume(
    run_dir: Path | str | None, resume: Path | str | None, from_round: int | None
) -> None:
    from fedml_plugin_fedmosaic.core.errors import ConfigError

    if resume is None and from_round is not None:
        raise ConfigError("--from-round needs --resume RUN_DIR")
    if resume is not None and run_dir is not None:
        raise ConfigError(
            "--run-dir cannot be combined with --resume",
            hint="a resumed run goes on in its own folder",
        )


def _note_failure(run_dir: Path | str | None, code: int, error: BaseException) -> None:
    """Tells the job's owner, also when the run failed before it could start."""
    from fedml_plugin_fedmosaic.core.errors import RunInUse
    from fedml_plugin_fedmosaic.launch.base import JOB_FILE
    from fedml_plugin_fedmosaic.runtime.status import say_ended

    if run_dir is None or isinstance(error, RunInUse):
        return
    if (Path(run_dir) / JOB_FILE).is_file():
        reason = str(error).partition("\n")[0] or type(error).__name__
        say_ended(Path(run_dir), code, reason)


def _load(
    algo: str | None,
    cf: Path | str | None,
    backend: str | None,
    overrides: Sequence[str],
    resume: Path | str | None,
) -> Experiment:
    from fedml_plugin_fedmosaic.config.loader import load_experiment

    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    path = None if cf is None else Path(cf)
    if resume is not None:
        from fedml_plugin_fedmosaic.runtime.resume import resumed_experiment

        return resumed_experiment(Path(resume), path, overrides, algo=algo, backend=backend)
    return load_experiment(path, overrides, algo=algo, backend=backend)


def train(
    experiment: Experiment,
    run_dir: Path | None = None,
    hooks: HooksFactory | None = None,
) -> RunSummary:
    """Runs an experiment with progress on the screen (on rank 0).

    Args:
        experiment: validated configuration.
        run_dir: folder for the results.
        hooks: as in :func:`run_command`.

    Raises:
        FedMosaicError: any of its classes.
    """
    from fedml_plugin_fedmosaic.launch.env import mpi_world

    prepare = _preparation(experiment, run_dir, hooks, _Options())
    return _execute(prepare, quiet=mpi_world()[0] > 0)


def _preparation(
    experiment: Experiment,
    run_dir: Path | None,
    hooks: HooksFactory | None,
    options: _Options,
) -> Callable[[Sequence[EventSink]], PreparedRun]:
    """Loads data and models once the sinks are known."""
    if hooks is None and experiment.dp.enable_dp:
        # By name: the two doors, this one and FedML's, do not import each other.
        module = import_module("fedml_plugin_fedmosaic.integrations.fedml.privacy")
        hooks = module.make_hooks

    def prepare(sinks: Sequence[EventSink]) -> PreparedRun:
        from fedml_plugin_fedmosaic.core.errors import AdapterError, ConfigError, PlanError
        from fedml_plugin_fedmosaic.runtime.federation import prepare_run

        made = hooks(experiment) if hooks is not None else None
        try:
            return prepare_run(
                experiment,
                run_dir,
                sinks,
                made,
                ranks=options.ranks,
                resume=options.resume,
                from_round=options.from_round,
                announce=_announce if options.ranks is None else None,
            )
        except (AdapterError, PlanError) as error:
            # Before anything is trained, a misfit is a mistake in the configuration.
            mistake = ConfigError(error.message, hint=error.hint)
            mistake.everywhere = error.everywhere
            for note in getattr(error, "__notes__", ()):
                mistake.add_note(note)
            raise mistake from error

    return prepare


def _announce(topology: Topology) -> None:
    """What the job was given and what each rank will do; on rank 0 of several."""
    from fedml_plugin_fedmosaic.launch.allocation import discover
    from fedml_plugin_fedmosaic.launch.env import mpi_world

    if topology.size == 1 or mpi_world()[0] > 0:
        return
    for label, value in (("job", discover().describe()), *topology.describe()):
        _print_line(f"{label:<10} {value}")


def _describe(prepared: PreparedRun, estimate: list[tuple[str, str]]) -> None:
    _print_lines([*prepared.describe(), *estimate])
    click.echo("nothing was trained or written (--dry-run)")


def _print_lines(lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        click.echo(f"{label:<{width}}  {value}")


def _execute(prepare: Callable[[Sequence[EventSink]], PreparedRun], *, quiet: bool) -> RunSummary:
    from rich.console import Console

    from fedml_plugin_fedmosaic.cli.progress import DropLines, LiveProgress, RoundLines
    from fedml_plugin_fedmosaic.runtime.signals import stop_on_signals

    console = Console()
    with ExitStack() as stack:
        request = stack.enter_context(stop_on_signals())
        if quiet:
            prepared = prepare((DropLines(_print_line),))
            prepared.should_stop = request
            return prepared.execute()
        if console.is_terminal:
            live = LiveProgress(console)
            with console.status("loading data and models"):
                prepared = prepare((live,))
            stack.enter_context(live)
        else:
            prepared = prepare((RoundLines(_print_line),))
        if prepared.experiment.run.tensorboard:
            from fedml_plugin_fedmosaic.report.tensorboard import TensorBoardSink

            folder = prepared.run_dir / "tensorboard"
            prepared.sinks = (*prepared.sinks, stack.enter_context(TensorBoardSink(folder)))
        prepared.should_stop = request
        return prepared.execute()


def _print_line(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()


def _conclude(summary: RunSummary) -> None:
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.report.html import write_report
    from fedml_plugin_fedmosaic.report.numbers import seconds
    from fedml_plugin_fedmosaic.report.tables import summary_rows, write_summary

    print_table(summary_rows(summary.run_dir))
    write_summary(summary.run_dir)
    report = write_report(summary.run_dir)
    click.echo(
        f"training {seconds(summary.train_s)}, in all {seconds(summary.duration_s)}\n"
        f"report   {report}"
    )
