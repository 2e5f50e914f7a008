from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import NUM_LAYERS, build, config, inputs, scramble
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from fedml_plugin_fedmosaic.adapters.export import export_plain_lora
from fedml_plugin_fedmosaic.adapters.lora import inject_lora
from fedml_plugin_fedmosaic.adapters.pq_lora import inject_pq_lora
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import View


@pytest.fixture(autouse=True)
def _what_peft_warns_of() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        # Right for merging in stock PEFT only; the adapter runs.
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but")
        yield


def injected(kind: str, **changes: Any) -> Any:
    handle = inject_pq_lora(build(kind), config(**changes), NUM_LAYERS, seed=0)
    scramble(handle)
    return handle


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava"])
@pytest.mark.parametrize("view", [View.LOCAL, View.GLOBAL, View.GATED])
def test_stock_peft_computes_the_same(kind: str, view: View, tmp_path: Path) -> None:
    handle, batch = injected(kind, alpha=6.0), inputs(kind)
    handle.set_view(view)
    want = handle.model(**batch).logits
    handle.set_view(View.BASE)
    assert export_plain_lora(handle, tmp_path, view) == tmp_path
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["lora_bias"] is True
    stock = PeftModel.from_pretrained(build(kind), str(tmp_path))
    assert sum(isinstance(module, LoraLayer) for module in stock.modules()) == 7 * NUM_LAYERS
    torch.testing.assert_close(stock(**batch).logits, want, rtol=1e-5, atol=1e-5)
    # Exporting leaves the view alone.
    assert torch.equal(handle.model(**batch).logits, build(kind)(**batch).logits)


def test_the_exported_folder_needs_nothing_of_this_package(tmp_path: Path) -> None:
    handle, batch = injected("llama"), inputs()
    want = handle.model(**batch).logits
    export_plain_lora(handle, tmp_path / "adapter", View.GATED)
    build("llama").save_pretrained(tmp_path / "base")
    torch.save({"batch": batch, "want": want.detach()}, tmp_path / "data.pt")
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base = LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
data = torch.load({str(tmp_path / "data.pt")!r}, weights_only=True)
error = (model(**data["batch"]).logits - data["want"]).abs().max().item()
assert not any(name.startswith("fedml_plugin") for name in sys.modules)
print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.strip().splitlines()[-1]) < 1e-5 * max(
        1.0, float(want.detach().abs().max())
    )


def test_plain_lora_is_written_as_it_is(tmp_path: Path) -> None:
    handle, batch = inject_lora(build(), config(), NUM_LAYERS, seed=0), inputs()
    scramble(handle)
    export_plain_lora(handle, tmp_path, View.LOCAL)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_bias"] is False
    stock = PeftModel.from_pretrained(build(), str(tmp_path))
    assert torch.equal(stock(**batch).logits, handle.model(**batch).logits)
    for view in (View.GATED, View.GLOBAL, View.BASE):
        with pytest.raises(AdapterError, match="plain LoRA"):
            export_plain_lora(handle, tmp_path, view)


def test_an_input_gate_has_no_plain_form(tmp_path: Path) -> None:
    handle = injected("llama", gate="input")
    with pytest.raises(AdapterError, match="gate: scalar"):
        export_plain_lora(handle, tmp_path / "gated", View.GATED)
    assert not (tmp_path / "gated").exists()
    with pytest.raises(AdapterError, match="'base' has no adapter"):
        export_plain_lora(handle, tmp_path / "base", View.BASE)
    export_plain_lora(handle, tmp_path / "local", View.LOCAL)
    handle.set_view(View.LOCAL)
    stock = PeftModel.from_pretrained(build(), str(tmp_path / "local"))
    want = handle.model(**inputs()).logits
    torch.testing.assert_close(stock(**inputs()).logits, want, rtol=1e-5, atol=1e-5)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be written"):
        export_plain_lora(object(), tmp_path, View.LOCAL)  # type: ignore[arg-type]
