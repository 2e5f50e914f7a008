"""One Markdown page per strategy, made of its docstring, its options and what it declares.

Like the configuration reference, so that there is one place to write these texts.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from fedml_plugin_fedmosaic.config.schema import option_rows
from fedml_plugin_fedmosaic.core.registry import STRATEGIES

_ADAPTERS = {
    "lora": "`lora`: one plain LoRA branch",
    "dual_lora": "`dual_lora`: two plain LoRA branches, local and global",
    "pq_lora": "`pq_lora`: PQ-LoRA at block ends, two LoRA branches elsewhere",
}


def strategy_page(name: str) -> str:
    """The page of one strategy.

    Args:
        name: registry name.

    Returns:
        Markdown, ending with a newline.

    Raises:
        RegistryError: there is no such strategy.
    """
    kind = STRATEGIES[name]
    title, _, rest = (inspect.getmodule(kind).__doc__ or "").strip().partition("\n")
    parts = [
        f"# {name}\n",
        "<!-- Made by `fedmosaic config strategies`; edit the strategy's own docstring. -->",
        f"\n{title}\n",
        _markdown(rest).strip("\n"),
        "\n## In a run\n",
        "```text",
        f"fedmosaic run --algo {name}",
        f"fedml run --algo {name}",
        "```\n",
        "\n".join(f"* {fact}" for fact in _facts(kind)),
        "\n## Options\n",
        "Keys of `strategy_args` / `strategy`.\n" if dataclasses.fields(kind.Options) else "None.",
    ]
    if dataclasses.fields(kind.Options):
        parts += option_rows(kind.Options)
    parts.append("\n[All strategies](../strategies.md)")
    return "\n".join(parts) + "\n"


def _facts(kind: Any) -> Iterator[str]:
    """What a strategy with its default options declares."""
    strategy = kind(kind.Options())
    yield f"Adapter: {_ADAPTERS.get(strategy.adapter, f'`{strategy.adapter}`')}."
    share = strategy.cost.share
    yield (
        f"Local steps at equal compute: {100 * share:.0f} for 100 of plain local training "
        f"(`optim.num_steps` times {share:g})."
    )
    views = [strategy.eval_view, *strategy.final_views]
    yield (
        "Reported model: the view "
        + ", and after the last round ".join(f"`{view}`" for view in views)
        + "."
    )
    if len(strategy.stages) > 1:
        yield "Stages of a round: " + ", ".join(f"`{stage}`" for stage in strategy.stages) + "."
    if strategy.final_stages:
        stages = ", ".join(f"`{stage}`" for stage in strategy.final_stages)
        yield f"Stages after the last round, for every client: {stages}."
    if strategy.needs_sketch:
        yield "Clients send sketches (`sketch_args`)."
    if strategy.needs_public:
        yield "Needs public samples (`data.public`, `data.public_samples`)."
    if strategy.needs_held_out:
        yield "Keeps a share `data.reserve` of the training samples away from training."


def _markdown(text: str) -> str:
    """A docstring's body: literal blocks fenced, double backticks single."""
    lines: list[str] = []
    block: list[str] | None = None
    margin = 0
    for line in [*textwrap.dedent(text).split("\n"), "end"]:
        indent = len(line) - len(line.lstrip())
        if block is not None:
            if not line.strip() or indent > margin:
                block.append(line)
                continue
            body = textwrap.dedent("\n".join(block)).strip("\n")
            fenced = ["```text", *body.split("\n"), "```"]
            lines += ["", *(" " * margin + row if row else row for row in fenced), ""]
            block = None
        shown = line.rstrip()
        if shown.endswith("::"):
            item = re.match(r"\s*(\d+\.|[*-])\s+", line)
            block, margin = [], indent if item is None else item.end()
            # After a blank the two colons stand for nothing.
            shown = shown[:-2].rstrip() if shown.endswith(" ::") else shown[:-1]
            if shown.strip() in ("", ":"):
                continue
        lines.append(shown.replace("``", "`"))
    return "\n".join(lines[:-1])


__all__ = ["strategy_page"]
