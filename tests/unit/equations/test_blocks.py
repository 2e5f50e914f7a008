from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers, block_of_layer

SIZES = st.integers(1, 12).flatmap(
    lambda blocks: st.tuples(st.integers(blocks, 90), st.just(blocks))
)


def test_remainder_goes_into_the_last_block() -> None:
    assert block_end_layers(28, 4) == (6, 13, 20, 27)
    assert block_end_layers(30, 4) == (6, 13, 20, 29)


@given(SIZES)
def test_blocks_are_monotone_and_end_where_they_say(sizes: tuple[int, int]) -> None:
    num_layers, num_blocks = sizes
    ends = block_end_layers(num_layers, num_blocks)
    blocks = [block_of_layer(layer, num_layers, num_blocks) for layer in range(num_layers)]
    assert len(ends) == num_blocks
    assert ends[-1] == num_layers - 1
    assert blocks == sorted(blocks)
    assert set(blocks) == set(range(num_blocks))
    last_of_block = {block: layer for layer, block in enumerate(blocks)}
    assert tuple(last_of_block[block] for block in range(num_blocks)) == ends


@pytest.mark.parametrize(("num_layers", "num_blocks"), [(3, 4), (0, 1), (4, 0), (4, -1)])
def test_impossible_cuts_are_refused(num_layers: int, num_blocks: int) -> None:
    with pytest.raises(AdapterError, match="blocks"):
        block_end_layers(num_layers, num_blocks)


@pytest.mark.parametrize("layer", [-1, 8])
def test_layers_outside_the_model_are_refused(layer: int) -> None:
    with pytest.raises(AdapterError, match=f"layer {layer}"):
        block_of_layer(layer, 8, 4)
