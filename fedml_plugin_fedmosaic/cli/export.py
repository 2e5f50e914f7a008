"""``fedmosaic export``."""

from __future__ import annotations

from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--client", type=click.IntRange(min=0), required=True, help="Client id, from 0.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write."
)
@click.option("--strategy", metavar="NAME", help="Strategy of the run; the main one by default.")
@click.option("--task", metavar="NAME", help="Task, for strategies with a model per task.")
@debug_option
def command(
    *, run_dir: Path, client: int, out: Path, strategy: str | None, task: str | None
) -> None:
    """Write a client's personal model as a plain LoRA adapter that stock PEFT loads.

    \b
    Examples:
      fedmosaic export runs/fedmosaic-quickstart-001 --client 0 --out client0
      python -c "from peft import PeftModel; PeftModel.from_pretrained(base_model, 'client0')"
    """
    from fedml_plugin_fedmosaic.runtime.export import export_client

    click.echo(export_client(run_dir, client, out, strategy=strategy, task=task))
