"""Memory that runs out: recognised, named with what can be changed, and no bug."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import save_text_model
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.errors import exit_code_of
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import (
    DeviceArgs,
    EngineConfig,
    EvalConfig,
    Experiment,
    FaultsConfig,
    ModelSpec,
    OptimConfig,
)
from fedml_plugin_fedmosaic.core.errors import ClientFailure, ConfigError, OutOfMemory
from fedml_plugin_fedmosaic.core.events import ClientDropped, Event
from fedml_plugin_fedmosaic.engine import models as models_module
from fedml_plugin_fedmosaic.engine.memory import in_short, ran_out_of_memory
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.runtime.faults import FaultGuard
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.shortage import Needs

CPU = torch.device("cpu")
GPU_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.20 GiB is free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 6.00 "
    "GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large ..."
)
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(GPU_TEXT), True),
        (MemoryError(), True),
        (RuntimeError(CPU_TEXT), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),  # somebody's words about something else
    ],
)
def test_what_counts_as_running_out(error: Exception, expected: bool) -> None:
    assert ran_out_of_memory(error) is expected


def test_a_real_allocation_that_is_too_large_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert ran_out_of_memory(caught.value)


def test_the_allocator_s_statistics_are_left_out() -> None:
    assert in_short(torch.OutOfMemoryError(GPU_TEXT)) == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 79.10 GiB of which 1.20 GiB is free."
    )
    assert in_short(MemoryError()) == "MemoryError"


class Client:
    client_id = 3

    def snapshot(self) -> Any:
        return 1

    def restore(self, snapshot: Any) -> None:
        self.state = snapshot


def attempt(guard: FaultGuard, stage: str, error: Exception) -> None:
    with guard.attempt(Client(), 1) as running:
        running.stage = stage
        raise error


def experiment(**changes: Any) -> Experiment:
    sections: dict[str, Any] = {
        "models": {"big": ModelSpec(path="big"), "tiny": ModelSpec(path="t", dtype="bfloat16")},
        "optim": OptimConfig(batch_size=4, grad_accumulation=3),
        "evaluation": EvalConfig(batch_size=16),
        "device": DeviceArgs(using_gpu=True),
        **changes,
    }
    return Experiment(**sections)


def failure(stage: str, error: Exception, **changes: Any) -> ClientFailure:
    """What a client's error becomes with policy "abort"."""
    needs = Needs(experiment=experiment(**changes), models={3: "big"}, proxy="tiny")
    guard = FaultGuard(FaultsConfig(), "s", [].append, needs=needs)
    with pytest.raises(ClientFailure) as caught:
        attempt(guard, stage, error)
    assert caught.value.__cause__ is error
    return caught.value


def test_training_names_client_model_batch_and_what_to_change() -> None:
    found = failure("fit", torch.OutOfMemoryError(GPU_TEXT))
    assert found.message.startswith("client 3, round 2, fit: OutOfMemoryError: CUDA out of memory.")
    assert found.message.endswith(
        "(model 'big', micro-batches of 4 samples, gradient checkpointing off)"
    )
    assert found.hint == (
        "set optim.batch_size: 2 with optim.grad_accumulation: 6, or "
        "engine_args.gradient_checkpointing: true, or models.big.quantization: bnb_nf4, or "
        "models.big.dtype: bfloat16; 'fedmosaic run --estimate' says what a client needs; with "
        "faults.policy: drop such a client is left out of the round"
    )


def test_only_what_can_still_be_changed_is_advised() -> None:
    found = failure(
        "fit",
        MemoryError(),
        optim=OptimConfig(batch_size=1),
        engine=EngineConfig(gradient_checkpointing=True),
        models={"big": ModelSpec(path="big", dtype="bfloat16", quantization="bnb_nf4")},
        faults=FaultsConfig(policy="drop"),
    )
    assert found.message.endswith(
        "MemoryError (model 'big', micro-batches of 1 sample, gradient checkpointing on)"
    )
    assert found.hint == "'fedmosaic run --estimate' says what a client needs"
    odd = failure("fit", MemoryError(), optim=OptimConfig(batch_size=3, grad_accumulation=2))
    assert "optim.batch_size: 1 with optim.grad_accumulation: 6" in (odd.hint or "")
    on_processor = failure("fit", RuntimeError(CPU_TEXT), device=DeviceArgs(using_gpu=False))
    assert "bnb_nf4" not in (on_processor.hint or "")


def test_a_sketch_is_the_proxy_s() -> None:
    found = failure("sketch", torch.OutOfMemoryError(GPU_TEXT))
    assert found.message.endswith("(proxy model 'tiny', micro-batches of 4 samples)")
    assert "gradient_checkpointing" not in (found.hint or "")
    assert "models.tiny.quantization: bnb_nf4" in (found.hint or "")
    assert "models.big" not in (found.hint or "")


def test_other_failures_keep_their_own_words() -> None:
    found = failure("fit", RuntimeError("boom"))
    assert (found.message, found.hint) == ("client 3, round 2, fit: RuntimeError: boom", None)


def test_with_policy_drop_the_reason_names_model_and_batch() -> None:
    events: list[Event] = []
    needs = Needs(experiment=experiment(), models={3: "big"})
    guard = FaultGuard(FaultsConfig(policy="drop"), "s", events.append, needs=needs)
    attempt(guard, "fit", torch.OutOfMemoryError(GPU_TEXT))
    (dropped,) = events
    assert isinstance(dropped, ClientDropped)
    assert dropped.client_id == 3
    assert dropped.reason.startswith("OutOfMemoryError: CUDA out of memory.")
    assert "model 'big', micro-batches of 4 samples" in dropped.reason


def test_an_evaluation_that_does_not_fit_is_named(tmp_path, monkeypatch) -> None:
    """In a whole run: of a client after training, and of the base model at the end."""
    world = load_experiment(write_world(tmp_path))
    world = replace(world, train=replace(world.train, comm_round=1))
    evaluate = TorchEngine.evaluate

    def small(self: TorchEngine, adapter: Any, *args: Any, **options: Any) -> Any:
        if (adapter is None) == of_base:
            raise torch.OutOfMemoryError(GPU_TEXT)
        return evaluate(self, adapter, *args, **options)

    monkeypatch.setattr(TorchEngine, "evaluate", small)
    of_base = False
    with pytest.raises(ClientFailure, match=r"client 0, round 1, evaluate: OutOfMem") as caught:
        prepare_run(world, tmp_path / "a").execute()
    assert "batches of 4 samples" in caught.value.message
    assert "evaluation.batch_size: 2" in (caught.value.hint or "")
    of_base = True
    world = replace(world, evaluation=replace(world.evaluation, base=True))
    with pytest.raises(OutOfMemory, match=r"evaluation of the base model: .*batches of 4") as ended:
        prepare_run(world, tmp_path / "b").execute()
    assert "evaluation.batch_size: 2" in (ended.value.hint or "")


@pytest.mark.parametrize("place", ["from_pretrained", "to"])
def test_a_model_that_does_not_fit_is_named(tmp_path, monkeypatch, place: str) -> None:
    spec = ModelSpec(path=str(save_text_model(tmp_path)))

    def full(*args: Any, **options: Any) -> Any:
        raise RuntimeError(CPU_TEXT)

    loader = models_module.AutoModelForCausalLM
    if place == "from_pretrained":
        monkeypatch.setattr(loader, "from_pretrained", full)
    else:
        monkeypatch.setattr("transformers.LlamaForCausalLM.to", full)
    with pytest.raises(OutOfMemory, match=r"model 'mine' .float32. does not fit into") as caught:
        load_model("mine", spec, CPU)
    assert "models.mine.dtype: bfloat16" in (caught.value.hint or "")
    assert "cpu: RuntimeError: [enforce fail" in caught.value.message


def test_another_error_while_loading_is_not_taken_for_it(tmp_path, monkeypatch) -> None:
    spec = ModelSpec(path=str(save_text_model(tmp_path)))

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a header is damaged")

    monkeypatch.setattr(models_module.AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(ConfigError, match=r"cannot be loaded from .*: a header is damaged"):
        load_model("mine", spec, CPU)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(GPU_TEXT)])
def test_memory_that_runs_out_elsewhere_is_no_bug(error: Exception, capsys) -> None:
    assert exit_code_of(error) == 9
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {type(error).__name__}")
    assert "more ranks (-np)" in shown
    assert "Traceback" not in shown
    assert "report it" not in shown
    assert exit_code_of(error, debug=True) == 9
    assert type(error).__name__ in capsys.readouterr().err
    assert exit_code_of(RuntimeError("boom")) == 1  # still one
