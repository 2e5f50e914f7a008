"""Greedy generation gives the same tokens with a key-value cache as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_models import IMAGE_ID, NUM_LAYERS, build, config, inputs, scramble
from transformers import DynamicCache

from fedml_plugin_fedmosaic.adapters.pq_lora import inject_pq_lora
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import View


def injected(kind: str, gate: str = "input") -> Any:
    handle = inject_pq_lora(build(kind, dtype=torch.float64), config(gate=gate), NUM_LAYERS, seed=0)
    scramble(handle, scale=0.3)
    return handle


def generate(handle: Any, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = handle.model.generate(
        **batch, max_new_tokens=10, do_sample=False, suppress_tokens=[IMAGE_ID], **options
    )
    return tokens


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava"])
@pytest.mark.parametrize("gate", ["scalar", "input"])
def test_the_cache_changes_no_token(kind: str, gate: str) -> None:
    handle, batch = injected(kind, gate), inputs(kind, dtype=torch.float64)
    with_cache = generate(handle, batch, use_cache=True)
    assert torch.equal(with_cache, generate(handle, batch, use_cache=False))
    handle.set_view(View.BASE)
    assert not torch.equal(with_cache, generate(handle, batch))


def test_the_prompts_gate_stays_while_text_is_generated() -> None:
    handle, batch = injected("llama"), inputs()
    layer = handle.model.get_base_model().model.layers[1].self_attn.q_proj
    seen = []
    original = layer._gate

    def spy(*args: Any) -> torch.Tensor:
        seen.append(original(*args))
        return seen[-1]

    layer._gate = spy
    for use_cache in (True, False):
        seen.clear()
        generate(handle, batch, use_cache=use_cache)
        assert len(seen) == 10
        assert all(torch.allclose(gate, seen[0], rtol=0, atol=1e-12) for gate in seen)
        assert not torch.allclose(seen[0], torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("gate", ["scalar", "input"])
def test_padding_and_neighbours_change_nothing(gate: str) -> None:
    handle, batch = injected("llama", gate), inputs()
    together = handle.model(**batch).logits[1, 3:]
    ids = batch["input_ids"][1:, 3:]
    alone = handle.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    # Rotary angles are computed in float32, and padding shifts the positions.
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


def test_a_cache_made_by_the_model_itself_can_be_continued() -> None:
    handle, batch = injected("llama"), inputs()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompt = handle.model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
    step = handle.model(
        input_ids=ids[:, 8:], attention_mask=mask, past_key_values=prompt.past_key_values
    )
    assert step.logits.shape[1] == 1
    # The gates of the prompt are kept, so this is not what one pass over all 9 tokens gives.
    whole = handle.model(**batch)
    assert not torch.allclose(step.logits[:, 0], whole.logits[:, -1])


def test_a_cache_from_elsewhere_is_refused() -> None:
    batch = inputs()
    cache = DynamicCache()
    build(dtype=torch.float64)(**batch, past_key_values=cache)
    handle = injected("llama")
    ids = batch["input_ids"][:, :1]
    with pytest.raises(AdapterError, match="not filled through this adapter"):
        handle.model(input_ids=ids, past_key_values=cache)


def test_two_caches_do_not_mix() -> None:
    handle = injected("llama")
    first, second = inputs(), inputs(length=12)
    alone = {id(b): generate(handle, b) for b in (first, second)}
    caches = {id(b): DynamicCache() for b in (first, second)}
    steps = {}
    for b in (first, second):
        steps[id(b)] = handle.model(**b, past_key_values=caches[id(b)])
    for b in (second, first):
        token = steps[id(b)].logits[:, -1].argmax(-1)
        assert torch.equal(token, alone[id(b)][:, b["input_ids"].shape[1]])
        mask = torch.cat([b["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        out = handle.model(
            input_ids=token[:, None], attention_mask=mask, past_key_values=caches[id(b)]
        )
        got = out.logits[:, -1].argmax(-1)
        assert torch.equal(got, alone[id(b)][:, b["input_ids"].shape[1] + 1])


def test_other_masks_are_refused() -> None:
    handle, batch = injected("llama"), inputs()
    batch["attention_mask"] = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    with pytest.raises(AdapterError, match="attention mask"):
        handle.model(**batch)


def test_a_copy_has_hooks_of_its_own() -> None:
    handle, batch = injected("llama"), inputs()
    want = generate(handle, batch)
    twin = copy.deepcopy(handle)
    other = inputs(length=5)
    generate(twin, other)
    contexts = {id(layer.context) for h in (handle, twin) for layer in layers(h)}
    assert len(contexts) == 2
    assert torch.equal(generate(twin, batch), want)


def layers(handle: Any) -> list[Any]:
    return [module for module in handle.model.modules() if hasattr(module, "pq_lora_gate")]
