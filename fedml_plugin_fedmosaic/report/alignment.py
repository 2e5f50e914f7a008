"""How well models correspond after ``fedmosaic align``: a table, warnings, plots and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report.alignment_plots import canonical_lines, layer_similarity
from fedml_plugin_fedmosaic.report.html import render, write_page
from fedml_plugin_fedmosaic.report.metrics import mean
from fedml_plugin_fedmosaic.report.numbers import seconds
from fedml_plugin_fedmosaic.report.parts import Figure, Headline, Section
from fedml_plugin_fedmosaic.report.tables import SummaryTable

PAGE_FILE = "alignment.html"
POOR = 0.5
"""Share of explained variance below which an alignment hardly says anything."""
MARGIN = 0.02
"""Difference of CKA below which a block resembles its partner as much as another."""
FEW_ROWS = 20
"""Token positions per rank below which canonical correlations flatter."""

FITTED_GAP = 0.1
"""Loss of canonical correlation on new samples from which B follows its samples too closely."""

Manifest = Mapping[str, Any]
"""An alignment manifest as its JSON says it."""


def read_alignments(folder: Path) -> dict[str, Manifest]:
    """The manifests of a folder by model name, the anchor's first.

    Raises:
        DataError: there are none, or one is damaged.
    """
    found: dict[str, Manifest] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if isinstance(manifest, dict) and "anchor" in manifest and "model" in manifest:
            found[manifest["model"]["name"]] = manifest
    if not found:
        raise DataError(f"no alignment in {str(folder)!r}", hint="make one with 'fedmosaic align'")
    return dict(sorted(found.items(), key=lambda item: (item[1]["quality"] is not None, item[0])))


def _blocks(manifest: Manifest) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Block -> linear -> quality."""
    blocks: dict[int, dict[str, Mapping[str, Any]]] = {}
    for key, quality in manifest["quality"]["linears"].items():
        block, _, module = key.partition("/")
        blocks.setdefault(int(block), {})[module] = quality
    return dict(sorted(blocks.items()))


def _ends(manifest: Manifest) -> list[tuple[int, int]]:
    quality = manifest["quality"]
    return list(zip(quality["anchor_ends"], quality["model_ends"], strict=True))


def _average(linears: Mapping[str, Mapping[str, Any]], field: str) -> float:
    return mean([linear[field] for linear in linears.values()]) or 0.0


def quality_table(manifests: Mapping[str, Manifest]) -> SummaryTable:
    """One row per block of each aligned model; values are means over the block's linears."""
    rows = []
    for name, manifest in manifests.items():
        if manifest["quality"] is None:
            continue
        ends = _ends(manifest)
        for block, linears in _blocks(manifest).items():
            own, other = ends[block]
            correlations = [mean(linear["correlations"]) or 0.0 for linear in linears.values()]
            rows.append(
                [
                    name,
                    str(block + 1),
                    f"{own + 1} | {other + 1}",
                    f"{manifest['quality']['cka'][own][other]:.2f}",
                    f"{_average(linears, 'residual_before'):.2f}",
                    f"{_average(linears, 'residual'):.2f}",
                    f"{_average(linears, 'explained'):.2f}",
                    f"{mean(correlations) or 0.0:.2f}",
                    f"{_average(linears, 'agreement'):.2f}",
                ]
            )
    columns = [
        "model",
        "block",
        "layers\nanchor | model",
        "CKA",
        "residual\nbefore",
        "residual\nof A",
        "explained\nvariance",
        "canonical\ncorr.",
        "same\ncoord.",
    ]
    notes = [
        "CKA of the block ends: 1 for a turned copy, 0 for unrelated layers.",
        "Residual: squared difference of both A outputs over the anchor's; 0 if they are equal,",
        "about 2 if they are unrelated. Explained: share of the variance by the best linear map.",
        "Same coordinate: squared correlation of each coordinate with its namesake in the anchor.",
    ]
    return SummaryTable(columns, rows, notes, num_left=3)


def overfitting_table(manifests: Mapping[str, Manifest]) -> SummaryTable | None:
    """The same measures on samples of the fit and on new ones, one row per block.

    Returns:
        None if no manifest has them, as those of older versions.
    """
    rows = []
    for name, manifest in manifests.items():
        if manifest["quality"] is None:
            continue
        for block, linears in _blocks(manifest).items():
            if any(linear.get("fitted") is None for linear in linears.values()):
                continue
            fitted = {module: linear["fitted"] for module, linear in linears.items()}
            row = [name, str(block + 1)]
            for field in ("residual", "explained"):
                row += [f"{_average(fitted, field):.2f}", f"{_average(linears, field):.2f}"]
            row += [f"{value:.2f}" for value in _correlations(linears)]
            row += [f"{_average(fitted, 'agreement'):.2f}", f"{_average(linears, 'agreement'):.2f}"]
            rows.append(row)
    if not rows:
        return None
    names = ("residual", "explained", "canonical", "same\ncoord.")
    columns = ["model", "block"]
    for name in names:
        columns += [f"{name}\nfitted", "\nnew"]
    notes = [
        "Fitted: samples that turned B, which A was fitted on, too. New: samples of the check."
    ]
    return SummaryTable(columns, rows, notes, num_left=2)


def _correlations(linears: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Mean canonical correlation on the samples of B, and along the same directions on new ones."""
    return (
        mean([mean(linear["correlations"]) or 0.0 for linear in linears.values()]) or 0.0,
        mean([mean(linear["new_correlations"]) or 0.0 for linear in linears.values()]) or 0.0,
    )


def warnings_of(manifests: Mapping[str, Manifest]) -> list[str]:
    """What a user should know before trusting the files; one sentence each."""
    lines = _strangers(manifests)
    for name, manifest in manifests.items():
        quality = manifest["quality"]
        if quality is None:
            continue
        anchor = manifest["anchor"]["name"]
        ends = _ends(manifest)
        for block, nearest in quality["unmatched"]:
            own = quality["cka"][ends[block][0]]
            partner, other = own[ends[block][1]], own[ends[nearest][1]]
            if other > partner + MARGIN:
                lines.append(
                    f"{name}: block {block + 1} of {anchor} resembles block {nearest + 1} "
                    f"(CKA {other:.2f}) more than its partner ({partner:.2f})"
                )
        rows = quality["rows"]["outputs"]
        if rows < FEW_ROWS * manifest["rank"]:
            lines.append(
                f"{name}: only {rows} token positions for rank {manifest['rank']}; canonical "
                "correlations are too high. Use --positions all, or more --output-samples"
            )
        if all(linear.get("new_correlations") for linear in quality["linears"].values()):
            fitted, new = _correlations(quality["linears"])
            if fitted - new > FITTED_GAP:
                lines.append(
                    f"{name}: canonical correlations are {fitted:.2f} on the samples of B and "
                    f"{new:.2f} on new ones. Use more --output-samples, or a smaller rank"
                )
        shares = [linear["explained"] for linear in quality["linears"].values()]
        if (mean(shares) or 0.0) < POOR:
            lines.append(
                f"{name}: the anchor explains {100 * (mean(shares) or 0.0):.0f} % of the variance "
                "of this model's A outputs; P and Q will hardly mean the same in both"
            )
        short = sum(linear["rank"] < manifest["rank"] for linear in quality["linears"].values())
        if short:
            lines.append(
                f"{name}: {short} linears have directions without a partner; their B is smaller "
                "there. Give more public samples, or a smaller rank"
            )
    return lines


def _strangers(manifests: Mapping[str, Manifest]) -> list[str]:
    """Models that have other linears than the first anchor, and so other coordinates."""
    first, *others = manifests.values()
    lines = []
    for manifest in others:
        if manifest["target_modules"] == first["target_modules"]:
            continue
        common = [name for name in first["target_modules"] if name in manifest["target_modules"]]
        lines.append(
            f"{manifest['model']['name']}: its linears ({', '.join(manifest['target_modules'])}) "
            f"are not those of {first['model']['name']}; P and Q of their clients are not mixed"
            + (f". Both have adapter.target_modules: [{', '.join(common)}]" if common else "")
        )
    return lines


def figures_of(name: str, manifest: Manifest) -> tuple[Figure, Figure]:
    """Layer similarity and canonical correlations of one aligned model."""
    quality = manifest["quality"]
    heat = layer_similarity(
        quality["cka"], _ends(manifest), anchor=manifest["anchor"]["name"], model=name
    )
    lines = canonical_lines(
        {
            f"block {block + 1}": {
                module: linear["correlations"] for module, linear in linears.items()
            }
            for block, linears in _blocks(manifest).items()
        },
        label=f"canonical correlations of {name}",
    )
    return (
        Figure(heat, "Unbiased linear CKA of all layers; frames mark the block ends that share P."),
        Figure(lines, "Canonical correlations of the A outputs: a thin line per linear."),
    )


def alignment_page(manifests: Mapping[str, Manifest]) -> str:
    """All aligned models of a folder as one page.

    Args:
        manifests: what :func:`read_alignments` returns.
    """
    first = next(iter(manifests.values()))
    table = quality_table(manifests)
    warnings = warnings_of(manifests)
    table.notes.extend(warnings)
    sections = [Section("quality", "Quality", "Means over the linears of each block.", table=table)]
    fitted = overfitting_table(manifests)
    if fitted is not None:
        lead = "What the fit has seen, against new samples of the same kind."
        sections.append(Section("fitted", "Fitted and new samples", lead, table=fitted))
    for name, manifest in manifests.items():
        if manifest["quality"] is None:
            continue
        quality = manifest["quality"]
        pairing = "the same tokens" if quality["pairing"] == "direct" else "tokens of equal text"
        lead = (
            f"{quality['rows']['outputs']:,} token positions for B and "
            f"{quality['rows']['check']:,} for the check; {pairing}, {quality['positions']} "
            f"positions; {len(quality['losses']):,} updates of A, loss "
            f"{quality['losses'][0]:.3g} to {quality['losses'][-1]:.3g}; "
            f"{seconds(manifest['duration_s'])}."
        )
        anchor = "".join(letter if letter.isalnum() else "-" for letter in name)
        sections.append(Section(f"model-{anchor}", name, lead, figures_of(name, manifest)))
    details = json.dumps(
        {name: {**m, "quality": None} for name, m in manifests.items()}, indent=1, sort_keys=True
    )
    sections.append(Section("manifests", "Manifests", "Without their quality.", text=details))
    data = first["data"]
    anchors = dict.fromkeys(manifest["anchor"]["name"] for manifest in manifests.values())
    return render(
        title="Alignment",
        subtitle=f"anchor {', '.join(anchors)} · rank {first['rank']} · "
        f"{first['num_blocks']} blocks · {data['num_samples']:,} public samples",
        numbers=_headlines(manifests),
        sections=sections,
    )


def _headlines(manifests: Mapping[str, Manifest]) -> list[Headline]:
    numbers = []
    for name, manifest in manifests.items():
        if manifest["quality"] is not None:
            linears = manifest["quality"]["linears"]
            numbers.append(
                Headline(
                    name,
                    f"{_average(linears, 'residual'):.2f}",
                    f"residual of A, {_average(linears, 'residual_before'):.2f} before",
                )
            )
    return numbers


def write_alignment_page(folder: Path) -> Path:
    """Writes ``alignment.html`` beside the alignment files.

    Raises:
        DataError: there are no alignment files.
    """
    return write_page(folder / PAGE_FILE, alignment_page(read_alignments(folder)))


__all__: Sequence[str] = [
    "alignment_page",
    "figures_of",
    "overfitting_table",
    "quality_table",
    "read_alignments",
    "warnings_of",
    "write_alignment_page",
]
