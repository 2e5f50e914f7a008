"""DeepSpeed's JSON: "auto" filled, contradictions named, everything else left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import EngineConfig, ModelSpec, OptimConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine.deepspeed import import_deepspeed
from fedml_plugin_fedmosaic.engine.deepspeed_config import (
    Dealing,
    deal,
    read_deepspeed_json,
    resolve_deepspeed,
)
from fedml_plugin_fedmosaic.engine.sharded import check_sharded

FILES = Path(__file__).parents[3] / "configs/deepspeed"
OPTIM = OptimConfig(batch_size=4, grad_accumulation=2, max_grad_norm=0.5, weight_decay=0.01)


def resolve(
    document: dict[str, Any],
    *,
    optim: OptimConfig = OPTIM,
    dtype: Any = "float32",
    ranks: int = 2,
) -> dict[str, Any]:
    spec = ModelSpec(path="org/model", dtype=dtype, ranks=ranks)
    return resolve_deepspeed(
        {"zero_optimization": {"stage": 2}, **document},
        optim=optim,
        spec=spec,
        hidden_size=64,
        ranks=ranks,
        path="zero.json",
    )


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "ranks", "expected"),
    [
        (4, 1, 1, Dealing(total=4, micro=4, steps=1)),
        (4, 1, 2, Dealing(total=4, micro=2, steps=1)),
        (4, 2, 2, Dealing(total=8, micro=4, steps=1)),
        (1, 4, 2, Dealing(total=4, micro=1, steps=2)),
        (3, 1, 2, Dealing(total=3, micro=2, steps=1)),
        (1, 1, 4, Dealing(total=1, micro=1, steps=1)),
    ],
)
def test_samples_are_dealt_over_the_ranks(
    batch_size: int, accumulation: int, ranks: int, expected: Dealing
) -> None:
    optim = OptimConfig(batch_size=batch_size, grad_accumulation=accumulation)
    assert deal(optim, ranks) == expected
    assert expected.micro * expected.steps * ranks >= expected.total


@pytest.mark.parametrize("path", sorted(FILES.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ready_files_resolve(path: Path, dtype: str) -> None:
    document = read_deepspeed_json(str(path))
    resolved = resolve(document, dtype=dtype)
    assert "auto" not in json.dumps(resolved)
    assert resolved["bf16"]["enabled"] is (dtype == "bfloat16")
    assert resolved["fp16"]["enabled"] is (dtype == "float16")
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["train_batch_size"] == 8
    zero = resolved["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64
    if zero["stage"] == 3:
        assert zero["stage3_param_persistence_threshold"] == 640
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert document == read_deepspeed_json(str(path))


def test_missing_keys_are_filled_and_foreign_ones_kept() -> None:
    resolved = resolve({"comms_logger": {"enabled": False}, "wall_clock_breakdown": True})
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["comms_logger"] == {"enabled": False}
    assert resolved["wall_clock_breakdown"] is True
    assert "bf16" not in resolved


def test_equal_values_are_accepted() -> None:
    resolved = resolve(
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.5,
            "fp16": {"enabled": False},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"},
            },
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        }
    )
    assert "optimizer" not in resolved
    assert "scheduler" not in resolved


@pytest.mark.parametrize(
    ("document", "key", "theirs", "ours"),
    [
        ({"train_batch_size": 16}, "train_batch_size", "16", "8"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu", "1", "4"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps", "3", "1"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "1.0", "0.5"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "True", "'float32'"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "'Lamb'", "'AdamW'"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "optimizer.params.lr",
            "0.001",
            "2e-05",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
            "optimizer.params.betas",
            "0.95",
            "0.999",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            "scheduler.params.warmup_num_steps",
            "5",
            "'constant'",
        ),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage", "0", "1, 2 or 3"),
        ({"amp": {"enabled": True}}, "amp.enabled", "True", "not supported"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device",
            "'nvme'",
            "'cpu'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
            "stage 3",
            "2",
        ),
        ({"flops_profiler": {"top_modules": "auto"}}, "flops_profiler.top_modules", "auto", ""),
    ],
)
def test_contradictions_name_key_and_both_values(
    document: dict[str, Any], key: str, theirs: str, ours: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(document)
    line = next(line for line in str(caught.value).splitlines() if key in line)
    assert theirs in line
    assert ours in line
    assert "zero.json" in str(caught.value)


def test_all_problems_of_a_file_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"train_batch_size": 16, "gradient_clipping": 1.0})
    assert "train_batch_size" in str(caught.value)
    assert "gradient_clipping" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a JSON file, got: No such file"),
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"engine_args\.deepspeed") as caught:
        read_deepspeed_json(str(path))
    assert message in str(caught.value)
    assert "configs/deepspeed" in str(caught.value)


def test_the_path_is_relative_to_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("engine_args: {deepspeed: zero.json, gradient_checkpointing: true}\n")
    engine = load_experiment(config).engine
    assert engine.deepspeed == str(tmp_path / "zero.json")
    assert engine.gradient_checkpointing


def test_without_a_file_a_sharded_model_is_refused() -> None:
    spec = ModelSpec(path="org/model", ranks=2)
    assert spec.sharded
    with pytest.raises(ConfigError, match="names no configuration"):
        check_sharded("large", spec, EngineConfig(), OPTIM)


def test_plain_pytorch_has_one_rank() -> None:
    assert not ModelSpec(path="org/model").sharded
    assert ModelSpec(path="org/model", engine="deepspeed").sharded
    with pytest.raises(ValueError, match="trains on one rank"):
        ModelSpec(path="org/model", engine="torch", ranks=2)


def test_a_missing_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ConfigError) as caught:
        import_deepspeed(torch.device("cpu"))
    assert "pip install 'fedml-plugin-fedmosaic[deepspeed]'" in str(caught.value)
