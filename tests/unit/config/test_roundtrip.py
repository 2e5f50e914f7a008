"""A dumped experiment loads as an equal one; FedML's reader sees the same sections."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedml_plugin_fedmosaic.config.judge import JudgeConfig
from fedml_plugin_fedmosaic.config.layout import section_types
from fedml_plugin_fedmosaic.config.loader import dump_experiment, load_experiment
from fedml_plugin_fedmosaic.config.sections import (
    SECTION_OF,
    CommonArgs,
    Experiment,
    ModelSpec,
    RunConfig,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ABSOLUTE = TEXT.map(lambda name: str(Path(f"/no/such/{name}")))  # no "//", no final "/"


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a JSON schema of our sections allows."""
    if "anyOf" in schema:
        return st.one_of([values(option) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    match schema["type"]:
        case "integer":
            return st.integers(schema.get("minimum", 0), 2**40)
        case "number":
            return st.floats(
                schema.get("minimum", schema.get("exclusiveMinimum", 0)),
                schema.get("maximum", schema.get("exclusiveMaximum", 1e300)),
                exclude_min="exclusiveMinimum" in schema,
                exclude_max="exclusiveMaximum" in schema,
            )
        case "array":
            return st.lists(values(schema["items"]), max_size=3).map(tuple)
        case "object":
            return st.dictionaries(TEXT, values(schema["additionalProperties"]), max_size=2)
        case other:
            return {"boolean": st.booleans(), "null": st.none(), "string": TEXT}[other]


def section(cls: Any, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    schema = TypeAdapter(cls).json_schema()["properties"]
    names = [item.name for item in dataclasses.fields(cls) if item.name not in fixed]
    return st.builds(cls, **{name: values(schema[name]) for name in names}, **fixed)


FIXED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "train": {
        "federated_optimizer": st.sampled_from(["FedMosaic", "fedmosaic"]),
        "client_num_in_total": st.none(),
    },
    "data": {
        "source": st.sampled_from(["quickstart", "drake"]),
        "root": st.none() | ABSOLUTE,
        "scenario": st.none() | ABSOLUTE,
        "rounds_per_task": st.none() | st.integers(1, 9).map(float),
    },
    "shift": {
        "time_field": st.none(),  # with it, no alpha may be set
        "novel": st.none() | st.just("task:digits-0"),
        "windows": st.just({}) | st.just({"digits-0": (2, 5)}),
        "present": st.just({}) | st.just({"0": ((1, 3), (6, 8))}),
    },
    "adapter": {
        "type": st.sampled_from(["auto", "lora", "pq_lora"]),
        "alignment": st.none() | st.just("bundled") | ABSOLUTE,
        "anchor": st.none(),
    },
    "engine": {"deepspeed": st.none() | ABSOLUTE},
    "sketch": {"proxy": st.none()},
    "faults": {"policy": st.just("drop")},  # a quorum needs it
    "evaluation": {
        "compare": st.lists(st.sampled_from(["local", "fedavg"])).map(tuple),
        "judge": st.none() | st.builds(JudgeConfig, record=TEXT, model=TEXT),
    },
}
SPEC: dict[str, st.SearchStrategy[Any]] = {
    "path": TEXT.map(lambda name: f"org/{name}"),
    "engine": st.sampled_from(["auto", "deepspeed"]),  # "torch" trains on one rank
    "quantization": st.just("none"),
}
PROXY: dict[str, st.SearchStrategy[Any]] = {
    **SPEC,
    "engine": st.sampled_from(["auto", "torch"]),
    "ranks": st.just(1),
    "quantization": st.just("int8"),
}
EXPERIMENTS = st.builds(
    Experiment,
    **{
        name: section(cls, **FIXED.get(name, {}))
        for name, cls in section_types().items()
        if name not in ("models", "strategy")
    },
    models=st.dictionaries(
        TEXT, section(ModelSpec, **SPEC) | section(ModelSpec, **PROXY), max_size=3
    ),
    strategy=st.just({}) | st.just({"temperature": 0.25, "top_k": None}),
)


@settings(max_examples=60)
@given(EXPERIMENTS)
@example(Experiment(run=RunConfig(name="\x85", root="a\u2028b\r\n")))
@example(
    Experiment(run=RunConfig(name="2e-5", root="0x1f"), common=CommonArgs(config_version="08"))
)
def test_load_reverses_dump(experiment: Experiment) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(dump_experiment(experiment), encoding="utf-8")
        assert load_experiment(path) == experiment


@given(EXPERIMENTS)
@settings(max_examples=20)
def test_fedml_can_read_a_dump(experiment: Experiment) -> None:
    # FedML reads with safe_load and flattens the sections into one namespace.
    tree = yaml.safe_load(dump_experiment(experiment))
    flat: dict[str, Any] = {}
    for name, content in tree.items():
        assert isinstance(content, dict), name
        assert not set(content) & set(flat), name
        flat.update(content)
    assert flat["comm_round"] == experiment.train.comm_round
    assert isinstance(flat["optim"]["learning_rate"], float)


def test_every_field_has_a_section() -> None:
    assert set(SECTION_OF) == {item.name for item in dataclasses.fields(Experiment)}
