"""What is said about an alignment, and how it is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report.alignment import (
    alignment_page,
    figures_of,
    overfitting_table,
    quality_table,
    read_alignments,
    warnings_of,
)
from fedml_plugin_fedmosaic.report.style import standalone

MODULES = ("q_proj", "down_proj")


def manifest(name: str, *, anchor: bool = False, **changes: Any) -> dict[str, Any]:
    quality: dict[str, Any] = {
        "linears": {
            f"{block}/{module}": {
                "residual_before": 2.0,
                "residual": 0.25 + 0.5 * block,
                "explained": 0.75,
                "correlations": [0.9, 0.5],
                "rank": 2,
                "agreement": 0.5,
                "scale": 1.0,
                "new_correlations": [0.8, 0.5],
                "fitted": {"residual": 0.125, "explained": 0.8, "agreement": 0.6},
            }
            for block in range(2)
            for module in MODULES
        },
        "losses": [3.0, 1.0],
        "rows": {"outputs": 400, "check": 300},
        "pairing": "tokens",
        "positions": "supervised",
        "learning_rate": 1e-4,
        "cka": [[0.9, 0.3, 0.2, 0.4], [0.4, 0.79, 0.7, 0.8]],
        "anchor_ends": [0, 1],
        "model_ends": [1, 3],
        "unmatched": [],
        **changes,
    }
    return {
        "format": 1,
        "model": {"name": name},
        "anchor": {"name": "small"},
        "rank": 2,
        "num_blocks": 2,
        "target_modules": sorted(MODULES),
        "data": {"num_samples": 900},
        "duration_s": 12.0,
        "quality": None if anchor else quality,
    }


def test_the_table_has_a_row_per_block() -> None:
    table = quality_table({"small": manifest("small", anchor=True), "big": manifest("big")})
    assert table.rows == [
        ["big", "1", "1 | 2", "0.30", "2.00", "0.25", "0.75", "0.70", "0.50"],
        ["big", "2", "2 | 4", "0.80", "2.00", "0.75", "0.75", "0.70", "0.50"],
    ]
    assert table.width <= 100


def test_fitted_and_new_samples_are_put_side_by_side() -> None:
    record = manifest("big")
    table = overfitting_table({"small": manifest("small", anchor=True), "big": record})
    assert table is not None
    fixed = ["0.80", "0.75", "0.70", "0.65", "0.60", "0.50"]
    assert table.rows == [
        ["big", "1", "0.12", "0.25", *fixed],
        ["big", "2", "0.12", "0.75", *fixed],
    ]
    assert table.width <= 100
    for linear in record["quality"]["linears"].values():
        linear.update(new_correlations=[0.7, 0.3])
    assert any(
        "are 0.70 on the samples of B and 0.50 on new" in w for w in warnings_of({"b": record})
    )
    for linear in record["quality"]["linears"].values():  # of an older version
        del linear["new_correlations"], linear["fitted"]
    assert overfitting_table({"big": record}) is None
    assert warnings_of({"big": record}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"unmatched": [[0, 1]]}, "block 1 of small resembles block 2 (CKA 0.40) more than its"),
        ({"unmatched": [[1, 0]]}, None),
        ({"rows": {"outputs": 39, "check": 300}}, "only 39 token positions for rank 2"),
    ],
)
def test_warnings_are_given_where_they_are_due(changes: dict[str, Any], words: str | None) -> None:
    found = warnings_of(
        {"small": manifest("small", anchor=True), "big": manifest("big", **changes)}
    )
    assert len(found) == (words is not None)
    assert all(line.startswith("big: ") and (words or "") in line for line in found)


def test_poor_and_missing_directions_are_warned_of() -> None:
    record = manifest("big")
    for linear in record["quality"]["linears"].values():
        linear.update(explained=0.25, rank=1)
    poor, short = warnings_of({"big": record})
    assert "explains 25 % of the variance" in poor
    assert "4 linears have directions without a partner" in short


def test_block_ends_are_framed_and_correlations_are_labelled() -> None:
    heat, lines = figures_of("big", manifest("big"))
    for figure in (heat, lines):
        tree = ElementTree.fromstring(standalone(figure.svg))  # noqa: S314 - our own
        assert tree.tag == "{http://www.w3.org/2000/svg}svg"
        assert "currentColor" not in standalone(figure.svg)
    assert heat.svg.count("#D55E00") + heat.svg.count("#d55e00") == 2
    assert "block 1" in lines.svg
    assert "block 2" in lines.svg


def test_a_page_shows_every_model_and_its_warnings() -> None:
    page = alignment_page(
        {
            "small": manifest("small", anchor=True),
            "org/big": manifest("org/big", unmatched=[[0, 1]]),
            "other": manifest("other"),
        }
    )
    assert page.count("<svg") == 4
    assert 'id="model-org-big"' in page
    assert "more than its partner" in page
    assert "anchor small · rank 2 · 2 blocks · 900 public samples" in page


def test_manifests_are_read_with_the_anchor_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no alignment in"):
        read_alignments(tmp_path)
    for name in ("a", "z"):
        (tmp_path / f"{name}.json").write_text(json.dumps(manifest(name, anchor=name == "z")))
    (tmp_path / "other.json").write_text("[]")
    assert list(read_alignments(tmp_path)) == ["z", "a"]
    (tmp_path / "other.json").write_text("[")
    with pytest.raises(DataError, match=r"other\.json is not JSON"):
        read_alignments(tmp_path)
