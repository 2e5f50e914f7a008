"""Runs under mpiexec: DeepSpeedEngine on all ranks against TorchEngine in each of them.

``zero_program.py FOLDER PORT`` prints ``ok <case> <check> <numbers>`` on rank 0 for everything that
holds on every rank, and ``failed ...`` for what does not; the test reads these lines.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from tiny_models import image_samples, save_llava, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EngineConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
)
from fedml_plugin_fedmosaic.core.errors import AdapterError, DataError
from fedml_plugin_fedmosaic.core.types import AdapterState, Branch, ProcessWorld, View
from fedml_plugin_fedmosaic.core.work import Pass
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec
from fedml_plugin_fedmosaic.engine.base import FitStopped
from fedml_plugin_fedmosaic.engine.factory import make_engine
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sharded import load_sharded_model
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

COMM = MPI.COMM_WORLD
FOLDER, PORT = Path(sys.argv[1]), int(sys.argv[2])
DEVICE = torch.device("cpu")
TOLERANCE = 1e-5
HANG_S = 300
ADAPTER = AdapterConfig(rank=2, alpha=4, num_blocks=2)
EVALUATION = EvalConfig(batch_size=4, max_new_tokens=3)
OPTIM = OptimConfig(
    batch_size=2,
    grad_accumulation=2,
    learning_rate=1e-2,
    pq_learning_rate=3e-2,
    max_grad_norm=0.5,
    weight_decay=0.01,
    schedule="cosine",
)
TASK = TaskSpec(dataset="words", subset_id=0, kind="multi-choice")
SAMPLES = text_samples(24)
# Whole, uneven, and one sample for two ranks.
BATCHES = [SAMPLES[0:4], SAMPLES[4:7], SAMPLES[7:8], SAMPLES[8:12], SAMPLES[12:16]]
OWN = Pass(name="own", view=View.GATED, train=frozenset({Branch.LOCAL, Branch.SHARED}), num_steps=5)
OTHER = Pass(name="other", view=View.GLOBAL, train=frozenset({Branch.GLOBAL}), num_steps=2)
CASES: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
    "zero3": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40},
    },
    "zero2_offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "zero3_offload": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    },
}


class Pair:
    """The same model twice: trained by this process alone, and by all ranks together."""

    def __init__(
        self,
        case: str,
        model: str = "text",
        dtype: Any = "float32",
        optim: OptimConfig = OPTIM,
        adapter: AdapterConfig = ADAPTER,
        **engine: Any,
    ) -> None:
        file = FOLDER / f"{case}.json"
        if COMM.rank == 0:
            file.write_text(json.dumps(CASES[case]), encoding="utf-8")
        COMM.barrier()
        config = EngineConfig(deepspeed=str(file), **engine)
        spec = ModelSpec(path=str(FOLDER / model), dtype=dtype, ranks=COMM.size)
        world = ProcessWorld(
            rank=COMM.rank,
            size=COMM.size,
            local_rank=COMM.rank,
            address="127.0.0.1",
            port=PORT,
        )
        self.bundle = load_sharded_model(
            model, spec, DEVICE, world=world, engine=config, optim=optim
        )
        common = (adapter, "pq_lora", optim, EVALUATION)
        self.many = make_engine(self.bundle, *common, config, seed=0)
        self.one = TorchEngine(load_model(model, spec, DEVICE), *common, 0)


def distance(first: AdapterState, second: AdapterState) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def moved(state: AdapterState, by: float, branch: Branch = Branch.LOCAL) -> AdapterState:
    """A downlink far away from what was trained."""
    return {key: value + by * (key.branch is branch) for key, value in state.items()}


def parity(case: str) -> str:
    pair = Pair(case)
    start = pair.one.initial_adapter()
    one = pair.one.fit(OWN, start, BATCHES, seed=1)
    many = pair.many.fit(OWN, pair.many.initial_adapter(), BATCHES, seed=1)
    curve = max(abs(a - b) for a, b in zip(one.losses, many.losses, strict=True))
    apart = distance(one.adapter, many.adapter)
    assert curve < TOLERANCE, (one.losses, many.losses)
    assert apart < TOLERANCE, apart
    assert distance(start, many.adapter) > 0.05
    assert (many.num_examples, many.num_tokens) == (one.num_examples, one.num_tokens)
    for adapter in (None, one.adapter):
        for mode in ("generate", "likelihood"):
            for engine in (pair.one, pair.many):
                engine._evaluation = replace(EVALUATION, mode=mode)
            scores = [e.evaluate(adapter, View.GATED, SAMPLES, TASK) for e in (pair.one, pair.many)]
            assert scores[0] == scores[1], scores
    # Evaluation in between, other tensors, and back again.
    for pass_ in (OWN, OTHER, OWN):
        a = pair.one.fit(pass_, moved(start, 0.2), BATCHES, seed=2)
        b = pair.many.fit(pass_, moved(start, 0.2), BATCHES, seed=2)
        assert distance(a.adapter, b.adapter) < TOLERANCE, pass_.name
    pair.many.close()
    assert all(not parameter.requires_grad for parameter in pair.bundle.model.parameters())
    again = make_engine(pair.bundle, ADAPTER, "lora", OPTIM, EVALUATION, EngineConfig(), seed=0)
    pair.one.close()
    alone = TorchEngine(pair.one._bundle, ADAPTER, "lora", OPTIM, EVALUATION, 0)
    plain = Pass(name="plain", view=View.LOCAL, train=frozenset({Branch.LOCAL}), num_steps=2)
    results = [e.fit(plain, e.initial_adapter(), BATCHES, seed=3) for e in (again, alone)]
    assert distance(results[0].adapter, results[1].adapter) < TOLERANCE
    again.close()
    return f"curve={curve:.1e} adapter={apart:.1e}"


def reload(case: str, moments: Any) -> str:
    """The step after a load starts from what was loaded, not from an old master copy."""
    pair = Pair(case, optim=replace(OPTIM, moments=moments, schedule="constant"))
    first = pair.many.fit(OWN, pair.many.initial_adapter(), BATCHES, seed=1)
    received = moved(first.adapter, 0.5)
    step = replace(OWN, num_steps=1)
    one, many = (
        engine.fit(step, received, BATCHES, seed=2, moments=first.moments)
        for engine in (pair.one, pair.many)
    )
    near, far = distance(received, many.adapter), distance(first.adapter, many.adapter)
    apart = distance(one.adapter, many.adapter)
    # AdamW moves an element by about its learning rate; the load moved it by 0.5.
    assert near < 0.1, near
    assert far > 0.4, far
    assert apart < TOLERANCE, apart
    assert bool(many.moments) == (moments == "keep")
    for key, kept in many.moments.items():
        assert kept.step == one.moments[key].step == 6
        assert torch.allclose(kept.first, one.moments[key].first, atol=TOLERANCE)
        assert torch.allclose(kept.second, one.moments[key].second, atol=TOLERANCE)
    pair.many.close()
    return f"to_received={near:.1e} to_old={far:.1e} to_unsharded={apart:.1e}"


def stop(case: str) -> str:
    """Stopped after two steps on the word of one rank, and taken up again: the same bits."""
    pair = Pair(case, optim=replace(OPTIM, moments="keep"))
    start = pair.many.initial_adapter()
    whole = pair.many.fit(OWN, start, BATCHES, seed=1)
    steps: list[int] = []
    try:
        pair.many.fit(
            OWN,
            start,
            BATCHES,
            seed=1,
            on_step=lambda done, _: steps.append(done),
            should_stop=lambda: COMM.rank == COMM.size - 1 and steps[-1] == 2,
        )
    except FitStopped as stopped:
        progress = stopped.progress
    assert steps == [1, 2]
    pair.many.fit(OWN, moved(start, 1.0), BATCHES, seed=9)
    rest = pair.many.fit(OWN, start, BATCHES, seed=1, progress=progress)
    assert rest.losses == whole.losses
    assert all(torch.equal(rest.adapter[key], whole.adapter[key]) for key in whole.adapter)
    for key, kept in whole.moments.items():
        assert torch.equal(kept.first, rest.moments[key].first)
        assert torch.equal(kept.second, rest.moments[key].second)
    pair.many.close()
    return f"steps={len(rest.losses)}"


def broken(case: str) -> str:
    """What one rank cannot read fails on all of them, and the engine goes on working."""
    pair = Pair(case, model="llava")
    start = pair.many.initial_adapter()
    lost = Sample(
        sample_id="lost",
        task="words-0",
        turns=("<image>what colour is this ?", "red"),
        images=(FOLDER / "nowhere.png",),
    )
    # The second sample of a batch is the second rank's.
    with pytest.raises(DataError, match="lost"):
        pair.many.fit(OWN, start, [[SAMPLES[0], lost]], seed=1)
    with pytest.raises(DataError, match="lost"):
        pair.many.evaluate(start, View.GATED, [SAMPLES[0], lost], TASK)
    with pytest.raises(AdapterError, match="missing"):
        pair.many.fit(OWN, dict(list(start.items())[1:]), BATCHES, seed=1)
    one = pair.one.fit(OWN, start, BATCHES, seed=1)
    many = pair.many.fit(OWN, start, BATCHES, seed=1)
    assert distance(one.adapter, many.adapter) < TOLERANCE
    pair.many.close()
    return "named"


def checkpointing(case: str) -> str:
    pair = Pair(case, gradient_checkpointing=True)
    start = pair.one.initial_adapter()
    one = pair.one.fit(OWN, start, BATCHES, seed=1)
    many = pair.many.fit(OWN, start, BATCHES, seed=1)
    apart = distance(one.adapter, many.adapter)
    assert apart < TOLERANCE, apart
    pair.many.close()
    return f"adapter={apart:.1e}"


def low_precision(case: str) -> str:
    pair = Pair(case, dtype="bfloat16")
    start = pair.one.initial_adapter()
    one = pair.one.fit(OWN, start, BATCHES, seed=1)
    many = pair.many.fit(OWN, start, BATCHES, seed=1)
    curve = max(abs(a - b) for a, b in zip(one.losses, many.losses, strict=True))
    assert curve < 0.2, (one.losses, many.losses)
    # What comes out is the master copy: finer than bfloat16, and close to the unsharded one.
    rounded = {key: value.bfloat16().float() for key, value in many.adapter.items()}
    assert distance(rounded, many.adapter) > 0
    frozen = [key for key in start if key.branch is Branch.GLOBAL]
    assert all(torch.equal(many.adapter[key], start[key]) for key in frozen)
    apart = distance(one.adapter, many.adapter)
    assert apart < 0.1, apart
    pair.many.close()
    return f"curve={curve:.1e} adapter={apart:.1e}"


def pictures(case: str) -> str:
    """An image-text model with an input gate; the vision tower is sharded, too."""
    pair = Pair(case, model="llava", adapter=replace(ADAPTER, gate="input"))
    # A folder per rank: nobody reads a file that another rank is writing.
    samples = image_samples(FOLDER / f"images{COMM.rank}", 8)
    task = TaskSpec(dataset="colours", subset_id=0, kind="multi-choice")
    start = pair.one.initial_adapter()
    batches = [samples[:4], samples[4:]]
    one = pair.one.fit(OWN, start, batches, seed=1)
    many = pair.many.fit(OWN, start, batches, seed=1)
    apart = distance(one.adapter, many.adapter)
    assert apart < TOLERANCE, apart
    scores = [
        engine.evaluate(one.adapter, View.GATED, samples, task) for engine in (pair.one, pair.many)
    ]
    assert scores[0] == scores[1], scores
    pair.many.close()
    return f"adapter={apart:.1e}"


def pieces(case: str) -> str:
    """Every rank holds its share of the base model, right after loading."""
    pair = Pair(case)
    whole = sum(parameter.numel() for parameter in load_model_parameters())
    mine = sum(
        parameter.ds_tensor.numel()
        for name, parameter in pair.bundle.model.named_parameters()
        if hasattr(parameter, "ds_tensor")
    )
    resident = sum(parameter.numel() for parameter in pair.bundle.model.parameters())
    adapter = sum(value.numel() for value in pair.many.initial_adapter().values())
    assert mine <= whole / COMM.size * 1.02, (mine, whole)
    assert resident <= adapter, (resident, adapter)
    pair.many.close()
    return f"share={mine / whole:.3f}"


def load_model_parameters() -> Any:
    return load_model("text", ModelSpec(path=str(FOLDER / "text")), DEVICE).model.parameters()


CHECKS: list[tuple[str, str, Callable[[], str]]] = [
    *((case, "parity", lambda case=case: parity(case)) for case in CASES),
    *(
        (case, f"reload_{kept}", lambda case=case, kept=kept: reload(case, kept))
        for case in ("zero1", "zero2", "zero3")
        for kept in ("reset", "keep")
    ),
    ("zero3_offload", "reload_keep", lambda: reload("zero3_offload", "keep")),
    *((case, "stop", lambda case=case: stop(case)) for case in ("zero2", "zero3")),
    ("zero3", "broken", lambda: broken("zero3")),
    *(
        (case, "checkpointing", lambda case=case: checkpointing(case))
        for case in ("zero2", "zero3")
    ),
    *((case, "bfloat16", lambda case=case: low_precision(case)) for case in ("zero2", "zero3")),
    ("zero3", "pictures", lambda: pictures("zero3")),
    ("zero3", "pieces", lambda: pieces("zero3")),
]


def main() -> None:
    # Ranks that wait for each other for ever say where, and end.
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    torch.set_num_threads(1)
    if COMM.rank == 0:
        save_text_model(FOLDER / "text", "llama", hidden=16, layers=2)
        save_llava(FOLDER / "llava", "qwen2", hidden=16, layers=2)
    COMM.barrier()
    environment = dict(os.environ)
    wanted = sys.argv[3:]
    for case, name, check in CHECKS:
        if wanted and f"{case}-{name}" not in wanted:
            continue
        try:
            said, good = check(), True
        except Exception:
            said, good = traceback.format_exc(), False
        # A failed check may leave ranks in different places; nothing after it means anything.
        everyone = COMM.allgather((good, said))
        if COMM.rank == 0:
            if all(fine for fine, _ in everyone):
                print(f"ok {case} {name} {said}", flush=True)
            else:
                print(f"failed {case} {name}", *(text for _, text in everyone), flush=True)
        if not all(fine for fine, _ in everyone):
            COMM.Abort(1)
    assert dict(os.environ).keys() - environment.keys() <= {
        "DS_ACCELERATOR",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
    }
    assert environment.items() <= dict(os.environ).items()


main()
