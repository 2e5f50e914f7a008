"""Blocks of decoder layers: how models of different depth are put side by side.

Source: FedMosaic (arXiv 2506.11024), block-wise placement of PQ-LoRA. A model of ``num_layers``
decoder layers is cut into ``num_blocks`` runs of consecutive layers; the last layer of each run is
the block-end layer, and block k of one model corresponds to block k of every other model.
"""

from __future__ import annotations

from bisect import bisect_left

from fedml_plugin_fedmosaic.core.errors import AdapterError


def block_end_layers(num_layers: int, num_blocks: int) -> tuple[int, ...]:
    """The last layer of every block.

    All blocks have ``num_layers // num_blocks`` layers; the remainder goes into the last one.
    The released code accepts fewer layers than blocks and then returns layer -1 repeatedly; that
    is refused here.

    Args:
        num_layers: decoder layers of the model, at least ``num_blocks``.
        num_blocks: blocks, at least 1.

    Returns:
        ``num_blocks`` strictly increasing 0-based layers; the last is ``num_layers - 1``.

    Raises:
        AdapterError: there are fewer layers than blocks, or no block.
    """
    if num_blocks < 1:
        raise AdapterError(
            f"cannot cut a model into {num_blocks} blocks; expected at least 1",
            hint="set adapter.num_blocks to 1 or more",
        )
    if num_layers < num_blocks:
        raise AdapterError(
            f"a model with {num_layers} decoder layers has no {num_blocks} blocks; "
            f"expected at least {num_blocks} layers",
            hint=f"set adapter.num_blocks to {max(num_layers, 1)} or fewer",
        )
    step = num_layers // num_blocks
    return (*(block * step - 1 for block in range(1, num_blocks)), num_layers - 1)


def block_of_layer(layer: int, num_layers: int, num_blocks: int) -> int:
    """The block a layer belongs to.

    Args:
        layer: 0-based decoder layer.
        num_layers: decoder layers of the model.
        num_blocks: blocks of the model.

    Returns:
        0-based block; monotone in ``layer``.

    Raises:
        AdapterError: the layer is not in the model, or the model cannot be cut this way.
    """
    ends = block_end_layers(num_layers, num_blocks)
    if not 0 <= layer < num_layers:
        raise AdapterError(
            f"layer {layer} is not in a model with {num_layers} decoder layers; "
            f"expected 0 to {num_layers - 1}"
        )
    return bisect_left(ends, layer)
