"""The table of a built folder: how large its tasks are, and what can be guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.lite.blind import Pair, blind_model


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteTable:
    """Text cells, one row per task.

    Attributes:
        columns: headers.
        rows: cells.
        notes: one sentence per line below the table.
        num_left: leading text columns.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    num_left: int = 3


def lite_table(folder: Path) -> LiteTable:
    """Sizes, majority baseline and blind model of every task.

    Raises:
        DataError: the folder is not a built DRAKE-lite.
    """
    rows = []
    doubtful = []
    for entry in _read(folder / "tasks.json"):
        blind = blind_model(_pairs(folder, entry, "train"), _pairs(folder, entry, "test"))
        name = f"{entry['dataset']}-{entry['subset_id']}"
        if blind.suspicious:
            doubtful.append(name)
        numbers = (blind.majority, blind.chance, blind.accuracy)
        rows.append(
            (
                name,
                entry["mirrors"],
                entry["Desc"] + (f" ({entry['unseen']})" if entry["unseen"] else ""),
                str(entry["images"]),
                str(entry["rows"]["train"]),
                str(entry["rows"]["test"]),
                *(f"{100 * number:.1f}" for number in numbers),
            )
        )
    verdict = (
        f"The blind model is above guessing on {', '.join(doubtful)}: there the text helps."
        if doubtful
        else "On no task is the blind model above guessing by three standard errors."
    )
    return LiteTable(
        columns=(
            "task", "mirrors", "what", "images", "train", "test", "majority", "chance", "blind",
        ),
        rows=tuple(rows),
        notes=(
            "In percent of the test rows. majority: the most frequent answer; chance: one of the "
            "choices; blind: a model of the question's text, trained on the training rows.",
            verdict,
        ),
    )  # fmt: skip


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            hint="build the folder with 'fedmosaic data build drake-lite'",
        ) from error


def _pairs(folder: Path, entry: Mapping[str, Any], split: str) -> list[Pair]:
    path = folder / "dataset" / entry["dataset"] / split / f"dataset-{entry['subset_id']}.json"
    return [
        (row["conversations"][0]["value"], row["conversations"][1]["value"]) for row in _read(path)
    ]
