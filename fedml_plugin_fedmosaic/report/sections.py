"""What a report shows: each function turns a run into one section, or None without its data."""

from __future__ import annotations

from collections.abc import Mapping

from fedml_plugin_fedmosaic.report import matrix_plots, plots
from fedml_plugin_fedmosaic.report.adaptation import unseen_tasks
from fedml_plugin_fedmosaic.report.clients import by_group, client_name, separators
from fedml_plugin_fedmosaic.report.compute import compute
from fedml_plugin_fedmosaic.report.failures import dropouts, rounds_with_dropouts
from fedml_plugin_fedmosaic.report.groups import groups
from fedml_plugin_fedmosaic.report.learning import task_boundaries
from fedml_plugin_fedmosaic.report.lives import lives, resumed_rounds
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics, mean
from fedml_plugin_fedmosaic.report.numbers import percent, readable_bytes, seconds
from fedml_plugin_fedmosaic.report.parts import Figure, Headline, Section
from fedml_plugin_fedmosaic.report.records import BASE
from fedml_plugin_fedmosaic.report.relations import mixing, relevance
from fedml_plugin_fedmosaic.report.replacements import replacements
from fedml_plugin_fedmosaic.report.streams import over_the_stream
from fedml_plugin_fedmosaic.report.tables import REFERENCE, SummaryTable, summary_table


def _gain(value: float | None, reference: float | None, name: str) -> str:
    if value is None or reference is None:
        return ""
    return f"{100 * (value - reference):+.1f} points to {name}"


def headlines(run: Run) -> list[Headline]:
    """The numbers at the top of a report; empty without a strategy."""
    if run.main is None:
        return []
    main = run.strategies[run.main]
    other = run.strategies.get(REFERENCE) if run.main != REFERENCE else None
    other = other or run.strategies.get(BASE)
    name = other.name if other is not None else ""
    moved = [main.bytes_per_client_round(way) for way in ("uplink", "downlink")]

    def against(attribute: str) -> str:
        value = getattr(main, attribute)
        return _gain(value, getattr(other, attribute) if other is not None else None, name)

    items = [
        Headline("Self", f"{percent(main.self_mean)} %", against("self_mean")),
        Headline("Others", f"{percent(main.others_mean)} %", against("others_mean")),
        Headline("Worst client, Self", f"{percent(main.worst)} %", against("worst")),
        Headline(
            "Sent per client",
            readable_bytes(moved[0]),
            f"a round; {readable_bytes(moved[1])} received",
        ),
        Headline("Training", seconds(main.train_s), f"{main.num_steps:,} steps of all clients"),
    ]
    return [item for item in items if not item.value.startswith("-")]


def summary(run: Run) -> Section:
    """The table of the command line."""
    return Section(
        "summary",
        "Result",
        table=summary_table(run, max_width=None),
    )


def accuracy(run: Run) -> Section | None:
    """Self over the rounds."""
    named = {n: run.strategies[n] for n in reversed(run.ordered) if n != BASE}
    shown = {name: metrics for name, metrics in named.items() if metrics.mean_curve}
    if not shown:
        return None
    base = run.strategies.get(BASE)
    level = base.self_mean if base is not None else None
    marks = {name: rounds for name, rounds in resumed_rounds(run).items() if name in shown}
    boundaries = task_boundaries(run.schedule)
    svg = plots.curves(
        {name: metrics.curves for name, metrics in shown.items()},
        {name: metrics.mean_curve for name, metrics in shown.items()},
        ylabel="Self, %",
        label="Accuracy per round",
        scale=100,
        reference=None if level is None else (BASE, level),
        marks=marks,
        boundaries=boundaries,
    )
    caption = "Mean over the clients bold, single clients faint."
    if boundaries:
        caption += " Grey lines: a new task begins."
    if marks:
        caption += " Dotted: rounds at which the run was resumed."
    return Section("accuracy", "Accuracy per round", figures=(Figure(svg, caption),))


def matrix(run: Run) -> Section | None:
    """Client by task accuracy of the main strategy, and its gain."""
    if run.main is None:
        return None
    main = run.strategies[run.main]
    cells, marks, names, tasks = _task_matrix(run, main)
    if not any(value is not None for row in cells for value in row):
        return None
    groups = separators(by_group(run))
    svg = matrix_plots.heat_map(
        cells, names, tasks, label=f"Accuracy of {run.main} by client and task",
        bar="accuracy, %", groups=groups, scale=100, digits=0, marks=marks,
    )  # fmt: skip
    figures = [Figure(svg, f"{run.main}; a client's own tasks are framed.")]
    other = run.strategies.get(REFERENCE)
    if other is not None and run.main != REFERENCE:
        theirs = _task_matrix(run, other)[0]
        gain = [
            [None if a is None or b is None else a - b for a, b in zip(x, y, strict=True)]
            for x, y in zip(cells, theirs, strict=True)
        ]
        if any(value is not None for row in gain for value in row):
            svg = matrix_plots.heat_map(
                gain, names, tasks, label=f"Gain over {REFERENCE} by client and task",
                bar="points", diverging=True, groups=groups, scale=100, digits=0, marks=marks,
            )  # fmt: skip
            figures.append(Figure(svg, f"Difference to {REFERENCE} in percentage points."))
    return Section("matrix", "Every client on every task", figures=tuple(figures))


def _task_matrix(
    run: Run, metrics: StrategyMetrics
) -> tuple[list[list[float | None]], list[tuple[int, int]], list[str], list[str]]:
    clients, scores = by_group(run), metrics.final_scores()
    tasks = list(dict.fromkeys(task for client in clients for task in client.tasks))
    tasks += [task for task in run.tasks if task not in tasks]
    cells: list[list[float | None]] = []
    marks = []
    for i, client in enumerate(clients):
        row = scores.get(client.client_id, {})
        cells.append([row[task].value if task in row else None for task in tasks])
        marks += [(i, j) for j, task in enumerate(tasks) if task in client.tasks]
    return cells, marks, [client_name(client) for client in clients], tasks


def traffic(run: Run) -> Section | None:
    """Bytes per round of the main strategy."""
    if run.main is None:
        return None
    rounds = run.strategies[run.main].rounds
    up = {r: float(sum(event.uplink_bytes.values())) for r, event in rounds.items()}
    down = {r: float(sum(event.downlink_bytes.values())) for r, event in rounds.items()}
    if not any(up.values()) and not any(down.values()):
        return None
    svg = plots.byte_bars(up, down, label="Bytes per round")
    lead = f"{run.main}: what would travel if every client were a machine of its own."
    return Section("traffic", "Bytes per round", lead, (Figure(svg, "All clients together."),))


def losses(run: Run) -> Section | None:
    """Training loss over the rounds."""
    lines = {name: run.strategies[name].losses() for name in reversed(run.ordered) if name != BASE}
    lines = {name: clients for name, clients in lines.items() if clients}
    if not lines:
        return None
    means = {
        name: {
            round_idx: sum(values) / len(values)
            for round_idx in sorted({r for line in clients.values() for r in line})
            if (values := [line[round_idx] for line in clients.values() if round_idx in line])
        }
        for name, clients in lines.items()
    }
    svg = plots.curves(
        lines,
        means,
        ylabel="loss, nats",
        label="Training loss per round",
    )
    caption = "Mean over the steps of a round; mean over the clients bold, single clients faint."
    return Section("losses", "Training loss", figures=(Figure(svg, caption),))


def views(run: Run) -> Section | None:
    """Scores of the single branches of the main strategy's models, where they were evaluated."""
    if run.main is None or len(run.strategies[run.main].views) < 2:
        return None
    main = run.strategies[run.main]
    rows = [
        [view, *(percent(mean(main.client_scores(s, view).values())) for s in ("self", "others"))]
        for view in main.views
    ]
    table = SummaryTable(["branches in use", "Self", "Others"], rows, [])
    lead = f"{run.main}: the local and the received (global) branch alone, and both with the gate."
    return Section("views", "Branches", lead, table=table)


def timing(run: Run) -> Section | None:
    """Where the time went."""
    rows = []
    for name in run.ordered:
        metrics = run.strategies[name]
        if not metrics.trained:
            continue
        fit = sum(event.duration_s for event in metrics.trained)
        tokens = sum(event.num_tokens for event in metrics.trained)
        rows.append(
            [
                name,
                str(len(metrics.rounds)),
                f"{metrics.num_steps:,}",
                f"{tokens:,}",
                seconds(fit),
                seconds(metrics.train_s),
                seconds(metrics.duration_s),
            ]
        )
    if not rows:
        return None
    columns = ["strategy", "rounds", "steps", "supervised\ntokens", "local\ntraining",
               "all rounds", "with\nevaluation"]  # fmt: skip
    return Section("timing", "Time", table=SummaryTable(columns, rows, []))


def reproduction(run: Run) -> list[Section]:
    """Configuration and environment, folded."""
    sections = []
    if run.config:
        lead = "Every key with its value, defaults included."
        sections.append(Section("config", "Configuration", lead, text=run.config.rstrip()))
    if run.environment:
        rows = []
        for key, value in run.environment.items():
            if isinstance(value, Mapping):
                rows += [
                    [name, "not installed" if v is None else str(v)] for name, v in value.items()
                ]
            else:
                rows.append([key, "-" if value is None else str(value)])
        table = SummaryTable(["", "version or value"], rows, [], num_left=2)
        sections.append(Section("environment", "Environment", table=table))
    return sections


def all_sections(run: Run) -> list[Section]:
    """All sections that the run has data for, in order."""
    makers = (
        accuracy, over_the_stream, relevance, mixing, groups, matrix, unseen_tasks, views, traffic,
        compute, losses, replacements, dropouts, rounds_with_dropouts, lives, timing,
    )  # fmt: skip
    found = [section for make in makers if (section := make(run)) is not None]
    return [summary(run), *found, *reproduction(run)]
