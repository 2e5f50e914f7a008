"""Work and its results as plain data for checkpoints, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    LocalResult,
    ModelRef,
    Objective,
    Pass,
    Probe,
    ProbeResult,
    Proximal,
    Result,
    Samples,
    Work,
)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(str(item) for item in value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def work_tree(work: Work) -> dict[str, Any]:
    """A pass or a probe as plain data."""
    tree: dict[str, Any] = _plain(asdict(work))
    return {"kind": type(work).__name__, **tree}


def work_from_tree(tree: Mapping[str, Any]) -> Work:
    """The inverse of :func:`work_tree`."""
    values = {key: value for key, value in tree.items() if key != "kind"}
    values["samples"] = Samples(values["samples"])
    if tree["kind"] == "Probe":
        values["models"] = {label: _model(model) for label, model in values["models"].items()}
        values["tasks"] = {label: tuple(tasks) for label, tasks in values["tasks"].items()}
        return Probe(**values)
    values.update(
        _objective(values), also=tuple(Objective(**_objective(v)) for v in values["also"])
    )
    return Pass(**values)


def _objective(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **tree,
        "view": View(tree["view"]),
        "train": frozenset(Branch(branch) for branch in tree["train"]),
        "overlay": tuple(tree["overlay"]),
        "proximal": tuple(_proximal(term) for term in tree["proximal"]),
        "distil": tuple(_distillation(term) for term in tree["distil"]),
    }


def _proximal(tree: Mapping[str, Any]) -> Proximal:
    branches = {name: Branch(tree[name]) for name in ("branch", "anchor_branch")}
    return Proximal(**{**tree, **branches})


def _distillation(tree: Mapping[str, Any]) -> Distillation:
    teachers = tuple(_model(teacher) for teacher in tree["teachers"])
    return Distillation(**{**tree, "teachers": teachers, "tasks": tuple(tree["tasks"])})


def _model(tree: Mapping[str, Any]) -> ModelRef:
    return ModelRef(overlay=tuple(tree["overlay"]), view=View(tree["view"]))


def slim(result: LocalResult) -> LocalResult:
    """A pass's result without tensors: what ``advance`` is given and a checkpoint holds."""
    return LocalResult(
        adapter={},
        losses=result.losses,
        num_examples=result.num_examples,
        num_tokens=result.num_tokens,
        duration_s=result.duration_s,
        task_losses=result.task_losses,
        flops=result.flops,
    )


def result_tree(result: Result) -> dict[str, Any]:
    """A result as plain data; a pass's is slim."""
    if isinstance(result, ProbeResult):
        return {
            "kind": "ProbeResult",
            "losses": {label: dict(tasks) for label, tasks in result.losses.items()},
            "counts": dict(result.counts),
            "tensors": dict(result.tensors),
            "labels": {key: list(ids) for key, ids in result.labels.items()},
            "flops": result.flops,
        }
    return {
        "kind": "LocalResult",
        "losses": list(result.losses),
        "num_examples": result.num_examples,
        "num_tokens": result.num_tokens,
        "duration_s": result.duration_s,
        "task_losses": dict(result.task_losses),
        "flops": result.flops,
    }


def result_from_tree(tree: Mapping[str, Any]) -> Result:
    """The inverse of :func:`result_tree`."""
    values = {key: value for key, value in tree.items() if key != "kind"}
    if tree["kind"] == "ProbeResult":
        values["labels"] = {key: tuple(ids) for key, ids in values["labels"].items()}
        return ProbeResult(**values)
    values["losses"] = tuple(values["losses"])
    return LocalResult(adapter={}, **values)


def results_tree(results: Mapping[str, Result]) -> dict[str, Any]:
    """Results by name as plain data."""
    return {name: result_tree(result) for name, result in results.items()}


def works_tree(works: Sequence[Work]) -> list[dict[str, Any]]:
    """Several pieces of work as plain data."""
    return [work_tree(work) for work in works]
