"""A page that shows what clients train on: samples with their images, by client and task."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample, TaskSpec
from fedml_plugin_fedmosaic.data.metrics import parse_choices
from fedml_plugin_fedmosaic.data.stats import StatsTable, stats_table
from fedml_plugin_fedmosaic.report.html import write_page

_SIDE = 96
_MAX_IMAGES = 8
_MAX_TEXT = 600
_MARK = "<image>"


@dataclass(frozen=True, slots=True)
class _Shown:
    images: tuple[str, ...]
    more_images: int
    question: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class _Task:
    number: int
    name: str
    kind: str
    num_train: int
    num_test: int
    also: tuple[int, ...]
    answers: str
    samples: tuple[_Shown, ...]


@dataclass(frozen=True, slots=True)
class _Client:
    client_id: int
    model: str
    tasks: tuple[_Task, ...]


def write_gallery(path: Path, data: FederatedData, *, num_samples: int = 3) -> Path:
    """Writes the page; it needs no network and no other file.

    Args:
        path: HTML file.
        data: loaded federation.
        num_samples: training samples per client and task, drawn once and for all.

    Returns:
        ``path``.

    Raises:
        DataError: an image is missing or does not decode.
    """
    thumbnails: dict[Path, str] = {}
    owners: dict[str, list[int]] = {}
    for client in data.clients:
        for task in client.tasks:
            owners.setdefault(task.name, []).append(client.client_id)
    clients = [_client(client, data, owners, num_samples, thumbnails) for client in data.clients]
    return write_page(path, _render(data, clients, stats_table(data)))


def _render(data: FederatedData, clients: Sequence[_Client], table: StatsTable) -> str:
    environment = Environment(
        loader=PackageLoader("fedml_plugin_fedmosaic.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = Counter(client.model for client in clients)
    subtitle = f"{len(clients)} clients · {len(data.tasks)} tasks · " + ", ".join(
        f"{count} x {name}" for name, count in models.items()
    )
    slots = max(len(client.tasks) for client in clients)
    return environment.get_template("gallery.html.j2").render(
        title=data.name, subtitle=subtitle, clients=clients, slots=slots, table=table
    )


def _client(
    client: ClientData,
    data: FederatedData,
    owners: Mapping[str, Sequence[int]],
    num_samples: int,
    thumbnails: dict[Path, str],
) -> _Client:
    tasks = []
    for number, (task, rows) in enumerate(zip(client.tasks, client.train, strict=True)):
        rng = python_random(0, "gallery", client.client_id, task.name)
        drawn = rng.sample(range(len(rows)), min(num_samples, len(rows)))
        tasks.append(
            _Task(
                number=number + 1,
                name=task.name,
                kind=_kind(task),
                num_train=len(rows),
                num_test=len(data.test.get(task.name, ())),
                also=tuple(k for k in owners[task.name] if k != client.client_id),
                answers=_answers(rows),
                samples=tuple(_shown(rows[index], thumbnails) for index in sorted(drawn)),
            )
        )
    return _Client(client.client_id, client.model_id, tuple(tasks))


def _kind(task: TaskSpec) -> str:
    return f"{task.kind}, {task.metric}" if task.metric else task.kind


def _answers(rows: Sequence[Sample]) -> str:
    """The answers by frequency in one line."""
    counts = Counter(row.answer for row in rows)
    parts = [f"{answer} {100 * count / len(rows):.0f} %" for answer, count in counts.most_common(6)]
    rest = len(counts) - len(parts)
    return ", ".join(parts) + (f" and {rest} more" if rest > 0 else "")


def _shown(sample: Sample, thumbnails: dict[Path, str]) -> _Shown:
    choices = parse_choices(sample.prompt, sample.answer)
    question = sample.prompt.replace(_MARK, " ").strip()
    if choices and "Choice list" in question:
        # The choices are shown beside the question.
        question = question.partition("Choice list")[0].strip()
    shown = sample.images[:_MAX_IMAGES]
    return _Shown(
        images=tuple(_thumbnail(path, thumbnails) for path in shown),
        more_images=len(sample.images) - len(shown),
        question=_cut(question),
        choices=choices,
        answer=_cut(sample.answer),
    )


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def _thumbnail(path: Path, known: dict[Path, str]) -> str:
    """A small copy of an image as a data URI."""
    if path not in known:
        try:
            with Image.open(path) as source:
                image = source.convert("RGBA")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"image {path} cannot be shown: {error}",
                hint="run 'fedmosaic data verify' to see all that is wrong",
            ) from error
        image.thumbnail((_SIDE, _SIDE))
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A"))
        stream = io.BytesIO()
        flat.save(stream, "JPEG", quality=85)
        known[path] = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return known[path]
