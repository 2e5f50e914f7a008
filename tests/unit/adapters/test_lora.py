from __future__ import annotations

import pytest
import torch
from adapter_models import NUM_LAYERS, build, config, inputs, scramble

from fedml_plugin_fedmosaic.adapters.lora import inject_lora
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, Part, View


def test_keys_and_shapes() -> None:
    handle = inject_lora(build("llava"), config(), NUM_LAYERS, seed=0)
    keys = handle.keys()
    assert len(keys) == 2 * 7 * NUM_LAYERS
    assert {key.branch for key in keys} == {Branch.LOCAL}
    assert {key.part for key in keys} == {Part.A, Part.B}
    assert [key.block for key in keys if key.module == "q_proj"][::2] == [0, 0, 1, 1, 1]
    state = handle.collect()
    assert all(tensor.any() == (key.part is Part.A) for key, tensor in state.items())


def test_more_blocks_than_layers_do_not_matter() -> None:
    handle = inject_lora(build(), config(num_blocks=9), NUM_LAYERS, seed=0)
    assert {key.block for key in handle.parameters()} == set(range(NUM_LAYERS))


def test_views_and_gradients() -> None:
    model, batch = build(), inputs()
    before = model(**batch).logits
    handle = inject_lora(model, config(), NUM_LAYERS, seed=0)
    assert torch.equal(handle.model(**batch).logits, before)
    scramble(handle)
    handle.set_trainable({Branch.LOCAL})
    changed = handle.model(**batch).logits
    assert not torch.allclose(changed, before)
    handle.set_view(View.BASE)
    assert torch.equal(handle.model(**batch).logits, before)
    handle.set_view(View.LOCAL)
    assert torch.equal(handle.model(**batch).logits, changed)
    assert len(handle.param_groups()["ab"]) == len(handle.keys())
    assert handle.param_groups()["pq"] == []
    handle.set_trainable({Branch.GLOBAL, Branch.SHARED})
    handle.set_view(View.LOCAL)
    assert handle.param_groups()["ab"] == []
    for view in (View.GLOBAL, View.GATED):
        with pytest.raises(AdapterError, match="one branch"):
            handle.set_view(view)


def test_an_alignment_is_refused() -> None:
    with pytest.raises(AdapterError, match="no aligned A and B"):
        inject_lora(build(), config(), NUM_LAYERS, seed=0, alignment={})
