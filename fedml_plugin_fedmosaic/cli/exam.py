"""``fedmosaic exam``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedml_plugin_fedmosaic.cli.options import debug_option

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.engine.exams import ExamResult

_SHOWN = 2


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("exam", metavar="gsm8k|mmlu")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder with the exam's published files.",
)
@click.option(
    "--client",
    "clients",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="N",
    help="Only this client. May be repeated.",
)
@click.option("--strategy", metavar="NAME", help="Strategy of the run; the main one by default.")
@click.option(
    "--questions",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ask N questions only (mmlu: of each subject).",
)
@click.option("--no-base", is_flag=True, help="Do not ask the untouched base models.")
@debug_option
def command(
    *,
    run_dir: Path,
    exam: str,
    data: Path,
    clients: tuple[int, ...],
    strategy: str | None,
    questions: int | None,
    no_base: bool,
) -> None:
    """Put a published exam to the clients' models of a finished run.

    gsm8k: DIR holds train.jsonl and test.jsonl; 8 worked examples, the final number counts.
    mmlu: DIR holds dev/ and test/ with a CSV file per subject; 5 solved questions, the likeliest
    letter counts. Results are added to exams.json in the run folder.

    \b
    Examples:
      fedmosaic exam runs/a gsm8k --data gsm8k
      fedmosaic exam runs/a mmlu --data mmlu --client 0 --questions 20
    """
    from fedml_plugin_fedmosaic.runtime.exam import RESULTS, take_exam

    def say(label: str, result: ExamResult) -> None:
        parts = list(result.parts.items())[:_SHOWN]
        more = "".join(f", {name} {100 * value:.1f}" for name, value in parts)
        click.echo(f"{label}: {100 * result.score:.1f} % of {result.num_questions}{more}")

    take_exam(
        run_dir,
        exam,
        data,
        clients=clients,
        strategy=strategy,
        base=not no_base,
        questions=questions,
        say=say,
    )
    click.echo(run_dir / RESULTS)
