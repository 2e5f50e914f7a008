from __future__ import annotations

import pytest
import torch
from adapter_models import NUM_LAYERS, build
from torch import nn

from fedml_plugin_fedmosaic.adapters.initial import kaiming_rows, orthonormal_rows
from fedml_plugin_fedmosaic.adapters.structure import find_text_tower
from fedml_plugin_fedmosaic.core.errors import AdapterError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def toy(*names: str) -> nn.Module:
    model = nn.Module()
    for name in names:
        setattr(model, name, nn.ModuleList([Layer(), Layer()]))
    return model


def test_a_list_inside_a_layer_is_not_the_list_of_layers() -> None:
    tower = find_text_tower(toy("stack"), ["up"], 2)
    assert [target.name for target in tower.targets] == ["stack.0.up", "stack.1.up"]
    assert (tower.name, tower.num_layers) == ("", 2)


def test_two_lists_are_ambiguous() -> None:
    with pytest.raises(AdapterError, match="found 2: one, two"):
        find_text_tower(toy("one", "two"), ["up"], 2)


def test_a_name_must_be_unique_in_its_layer() -> None:
    model = toy("stack")
    model.stack[0].more = nn.ModuleDict({"up": nn.Linear(4, 4)})  # type: ignore[union-attr, index]
    with pytest.raises(AdapterError, match="layer 0: 2 linears are called 'up'"):
        find_text_tower(model, ["up"], 2)


def test_the_depth_can_be_read_or_must_be_given() -> None:
    assert find_text_tower(build("llava"), ["q_proj"]).num_layers == NUM_LAYERS
    with pytest.raises(AdapterError, match="give num_layers"):
        find_text_tower(toy("stack"), ["up"])


def test_orthonormal_rows_are_uniform_and_reproducible() -> None:
    draws = torch.stack([orthonormal_rows(2, 3, seed) for seed in range(400)])
    torch.testing.assert_close(draws @ draws.mT, torch.eye(2).double().expand(400, 2, 2))
    # Uniform on the sphere: every entry has mean 0 and variance 1/3.
    assert draws.mean(0).abs().max() < 0.1
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 0.06
    assert torch.equal(draws[7], orthonormal_rows(2, 3, 7))
    assert not torch.equal(orthonormal_rows(2, 3, 7, "A"), orthonormal_rows(2, 3, 7, "B"))
    with pytest.raises(AdapterError, match="cannot be orthonormal"):
        orthonormal_rows(4, 3, 0)


def test_kaiming_rows_fill_their_interval() -> None:
    draw = kaiming_rows(64, 100, 0, 1, "q_proj")
    assert draw.abs().max() <= 0.1
    assert float(draw.std()) == pytest.approx(0.2 / 12**0.5, rel=0.03)
