"""Where the rows of the text tasks come from: a folder, or downloads that are kept.

The rows are those of CL_Benchmark in the repository of O-LoRA (Wang et al. 2023, arXiv
2310.14152): public classification sets, lists of ``{"sentence", "label"}``. Files are fetched at
one commit; the SHA-256 of each is kept beside it when it is first fetched and checked whenever it
is read again, so that a file that changes or breaks is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.core.errors import DataError

Split = Literal["train", "test"]

SOURCES_VARIABLE = "FEDMOSAIC_DATA_SOURCES"
"""Names a folder with the files, for machines without internet."""
COMMIT = "b51298af353f5846122467f07ef31cf29a61ab1c"
BASE_URL = f"https://raw.githubusercontent.com/cmnfriend/O-LoRA/{COMMIT}/"
_FOLDER = "CL_Benchmark"
_LINES = "classification10.jsonl"
_SUMS = "SHA256SUMS.json"
_TIMEOUT_S = 60.0
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """One labelled text."""

    text: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSet:
    """A public data set.

    Attributes:
        name: short name, e.g. ``sst2``.
        folder: below ``CL_Benchmark``.
        test_file: held-out file there.
        labels: all labels; rows with another one are left out.
        licence: of the data.
        home: where the data come from.
    """

    name: str
    folder: str
    test_file: str
    labels: tuple[str, ...]
    licence: str
    home: str


_NLI = ("entailment", "neutral", "contradiction")
_GRADES = ("very negative", "negative", "neutral", "positive", "very positive")
_TOPICS = ("World", "Sports", "Business", "Science or Technology")
_SUPER_GLUE = "SuperGLUE terms: research use"
TEXT_SETS: Mapping[str, TextSet] = {
    item.name: item
    for item in (
        TextSet(
            name="sst2", folder="SC/SST-2", test_file="test.json", labels=("Bad", "Good"),
            licence="no licence stated; research use", home="Socher et al. 2013, GLUE",
        ),
        TextSet(
            name="amazon", folder="SC/amazon", test_file="dev.json", labels=_GRADES,
            licence="Amazon's terms: research use", home="McAuley and Leskovec 2013",
        ),
        TextSet(
            name="agnews", folder="TC/agnews", test_file="test.json", labels=_TOPICS,
            licence="non-commercial use", home="AG's corpus; Zhang et al. 2015",
        ),
        TextSet(
            name="mnli", folder="NLI/MNLI", test_file="dev.json", labels=_NLI,
            licence="OANC and others, see its paper", home="Williams et al. 2018",
        ),
        TextSet(
            name="rte", folder="NLI/RTE", test_file="dev.json",
            labels=("entailment", "contradiction"), licence=_SUPER_GLUE, home="RTE, GLUE",
        ),
        TextSet(
            name="cb", folder="NLI/CB", test_file="test.json", labels=_NLI,
            licence=_SUPER_GLUE, home="de Marneffe et al. 2019",
        ),
        TextSet(
            name="qqp", folder="QQP/QQP", test_file="dev.json", labels=("False", "True"),
            licence="Quora's terms: non-commercial use", home="Quora question pairs, GLUE",
        ),
        TextSet(
            name="wic", folder="WiC/WiC", test_file="test.json", labels=("False", "True"),
            licence="CC BY-NC 4.0", home="Pilehvar and Camacho-Collados 2019",
        ),
        TextSet(
            name="copa", folder="COPA/COPA", test_file="dev.json", labels=("A", "B"),
            licence="BSD 2-Clause", home="Roemmele et al. 2011",
        ),
        TextSet(
            name="boolq", folder="BoolQA/BoolQA", test_file="dev.json", labels=("False", "True"),
            licence="CC BY-SA 3.0", home="Clark et al. 2019",
        ),
    )
}  # fmt: skip


def read_rows(
    item: TextSet, split: Split, sources: Path | None, say: Callable[[str], None]
) -> list[TextRow]:
    """The rows of one data set, in the order of its file.

    Args:
        item: which one.
        split: train or test.
        sources: folder with ``CL_Benchmark/`` as in the repository, or with
            ``classification10.jsonl``: lines of ``{"task", "split", "text", "label"}``. None:
            ``FEDMOSAIC_DATA_SOURCES`` if set, else downloads.
        say: is told about downloads.

    Raises:
        DataError: no such file, or it cannot be fetched or read.
    """
    named = os.environ.get(SOURCES_VARIABLE)
    folder = sources or (Path(named).expanduser() if named else None)
    file = Path(_FOLDER) / item.folder / ("train.json" if split == "train" else item.test_file)
    if folder is None:
        path = _fetched(file, say)
    elif (folder / file).is_file():
        path = folder / file
    elif (folder / _LINES).is_file():
        found = _known(_from_lines(folder / _LINES, item.name, split), item)
        return _some(found, folder / _LINES, item)
    else:
        raise DataError(
            f"text tasks: expected {file} or {_LINES} in {folder}, got neither",
            hint=f"correct {SOURCES_VARIABLE}, or unset it to download the files",
        )
    return _some(_known(_from_json(path), item), path, item)


def _some(rows: Iterable[TextRow], path: Path, item: TextSet) -> list[TextRow]:
    found = list(rows)
    if not found:
        raise DataError(
            f"{path}: expected rows of {item.name} with the labels {', '.join(item.labels)}, "
            "got none"
        )
    return found


def _known(rows: Iterable[TextRow], item: TextSet) -> Iterator[TextRow]:
    return (row for row in rows if row.label in item.labels and row.text.strip())


def _from_json(path: Path) -> Iterator[TextRow]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            yield TextRow(text=str(row["sentence"]), label=str(row["label"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _from_lines(path: Path, task: str, split: Split) -> Iterator[TextRow]:
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row: dict[str, Any] = json.loads(line)
                if row["task"] == task and row["split"] == split:
                    yield TextRow(text=str(row["text"]), label=str(row["label"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: expected labelled texts, got {type(error).__name__}: {error}",
        hint="remove the file and build again; it is fetched anew",
    )


def _fetched(file: Path, say: Callable[[str], None]) -> Path:
    """The cached copy of a file, downloaded if it is not there, with its sum checked."""
    root = cache_dir() / "downloads" / f"o-lora-{COMMIT[:10]}"
    path, sums_path = root / file, root / _SUMS
    sums = json.loads(sums_path.read_text(encoding="utf-8")) if sums_path.is_file() else {}
    key = file.as_posix()
    if not path.is_file():
        say(f"fetching {BASE_URL}{key}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        _download(BASE_URL + key, part)
        _check_sum(part, sums.get(key))
        part.rename(path)
        sums_path.write_text(
            json.dumps({**sums, key: _sha256(path)}, indent=1, sort_keys=True), encoding="utf-8"
        )
    else:
        _check_sum(path, sums.get(key))
    return path


def _check_sum(path: Path, expected: str | None) -> None:
    got = _sha256(path)
    if expected is not None and got != expected:
        raise DataError(
            f"{path}: expected SHA-256 {expected}, as when it was first fetched, got {got}",
            hint="remove it to fetch it again",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "fedml-plugin-fedmosaic"})  # noqa: S310 - https
    try:
        with (
            urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer,  # noqa: S310 - https
            path.open("wb") as out,
        ):
            while block := answer.read(_CHUNK):
                out.write(block)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{url} cannot be fetched: {error}",
            hint="run this where there is internet, or set "
            f"{SOURCES_VARIABLE} to a folder that holds {_FOLDER}/ or {_LINES}",
        ) from error
