"""Parameters, bytes, memory and work of a client, computed from widths alone.

Sizes of FedMosaic's adapters (arXiv 2506.11024), with r the rank, N_B blocks, L layers, m linears
per layer, S_io = sum of (inputs + outputs) and S_in = sum of inputs of a layer's linears::

    P and Q, shared across models     N_B m (r^2 + r)
    A and B of the other layers       (L - N_B) r S_io
    frozen A and B of block ends      N_B r S_io
    gate                              L m (scalar) or L S_in (input)

Memory follows what the engines keep: the frozen base in its dtype, adapters in float32 (PyTorch)
or in the model's dtype with float32 master copies (DeepSpeed), AdamW's two float32 moments, and
the tensors that autograd saves. Partitioning is that of ZeRO (arXiv 1910.02054).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedml_plugin_fedmosaic.config.sections import AdapterConfig, ModelSpec, SketchConfig
from fedml_plugin_fedmosaic.engine.shapes import Linear, ModelShape
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BITS = {"int8": 8.0, "bnb_int8": 8.0, "bnb_nf4": 4.5}  # 4 bits and one scale per 64 weights
_MASTER_AND_MOMENTS = 12  # float32 master copy and AdamW's two moments
_MOMENTS = 8
_CONTEXT_BYTES = int(0.8 * 2**30)  # CUDA context, kernels and the allocator's slack
_ANSWER_TOKENS = 32
_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """Parameters of one adapter.

    Attributes:
        pq: P and Q of one branch; 0 for plain LoRA.
        conventional: layer-wise A and B of one branch.
        gate: of all linears.
        frozen: A and B of block-end layers, which nobody trains and nobody sends.
        branches: 2 if there is a global branch beside the local one.
    """

    pq: int
    conventional: int
    gate: int
    frozen: int
    branches: int

    @property
    def trainable(self) -> int:
        """What local training changes: the local branch and the gate."""
        return self.pq + self.conventional + self.gate

    @property
    def resident(self) -> int:
        """What the model holds: both branches, frozen factors and the gate."""
        return self.branches * (self.pq + self.conventional) + self.frozen + self.gate

    @property
    def upload(self) -> int:
        """What a client sends per round if another client has the same model."""
        return self.pq + self.conventional


def adapter_size(shape: ModelShape, config: AdapterConfig, kind: str) -> AdapterSize:
    """Parameters that an adapter of a kind has on a model.

    Args:
        shape: the model.
        config: rank, blocks, gate and target modules.
        kind: ``pq_lora``; ``dual_lora`` and ``lora`` are plain LoRA with two and one branches.

    Raises:
        AdapterError: the model has fewer layers than blocks.
    """
    rank = config.rank
    linears = _carriers(shape, config)
    factors = [rank * (linear.in_features + linear.out_features) for linear in linears]
    if kind != "pq_lora":
        branches = 2 if kind == "dual_lora" else 1
        return AdapterSize(pq=0, conventional=sum(factors), gate=0, frozen=0, branches=branches)
    ends = set(block_end_layers(shape.layers, config.num_blocks))
    at_ends = [linear.layer in ends for linear in linears]
    gate = sum(linear.in_features if config.gate == "input" else 1 for linear in linears)
    return AdapterSize(
        pq=sum(at_ends) * (rank**2 + rank),
        conventional=sum(size for size, end in zip(factors, at_ends, strict=True) if not end),
        gate=gate,
        frozen=sum(size for size, end in zip(factors, at_ends, strict=True) if end),
        branches=2,
    )


def _carriers(shape: ModelShape, config: AdapterConfig) -> list[Linear]:
    """The linears that carry an adapter."""
    if "all-linear" in config.target_modules:
        return list(shape.linears)
    return [linear for linear in shape.linears if linear.module in config.target_modules]


def reference_trainable(shape: ModelShape, config: AdapterConfig) -> int:
    """Parameters that the released code reports as trainable, which is more than it trains.

    Beside what it trains with an input gate, it counts the gate's noise weights, which never get a
    gradient, and P and Q of layers that do not use them.
    """
    size = adapter_size(shape, _with_input_gate(config), "pq_lora")
    per_linear = config.rank**2 + config.rank
    count = len(_carriers(shape, config)) // shape.layers
    unused = (shape.layers - config.num_blocks) * count * per_linear
    return size.trainable + size.gate + unused


def reference_state(shape: ModelShape, config: AdapterConfig) -> int:
    """Values of a client's whole state in the released simulator.

    It allocates all tensors of both branches in every linear, used or not.
    """
    size = adapter_size(shape, _with_input_gate(config), "pq_lora")
    per_linear = config.rank**2 + config.rank
    everywhere = len(_carriers(shape, config)) * per_linear
    return 2 * (size.conventional + size.frozen + everywhere + size.gate)


def _with_input_gate(config: AdapterConfig) -> AdapterConfig:
    return AdapterConfig(
        rank=config.rank,
        alpha=config.alpha,
        num_blocks=config.num_blocks,
        gate="input",
        target_modules=config.target_modules,
    )


def sketch_shape(proxy: ModelShape, config: SketchConfig) -> tuple[int, int]:
    """Rows and columns of what a client sends beside its adapter.

    Args:
        proxy: the model whose gradients are compared.
        config: rows kept and compression.
    """
    if config.floats is not None:
        return config.floats, 1
    return max(1, int(config.row_fraction * proxy.hidden)), config.columns or proxy.inner


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """How a rank group cuts a client (DeepSpeed's ZeRO).

    Attributes:
        stage: 0 for plain PyTorch on one rank; 1 to 3.
        ranks: ranks of the group.
        offload_optimizer: master copies and moments wait in the machine's memory.
        offload_parameters: so do the pieces of the weights (stage 3).
        live: parameters that stage 3 keeps gathered at one time, at most.
    """

    stage: Literal[0, 1, 2, 3] = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    live: int = _LIVE_PARAMETERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the GPU of one rank while it trains, and what waits in the machine's memory.

    Attributes:
        base: frozen weights.
        adapter: adapter tensors.
        gradients: of the trained tensors.
        optimizer: AdamW's moments, and master copies under DeepSpeed.
        gathered: weights that stage 3 has put together for use.
        activations: what autograd saves for one micro-batch, and logits.
        proxy: a proxy model that is loaded beside the client's.
        host: offloaded, per rank.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    proxy: int
    host: int

    @property
    def total(self) -> int:
        """All that is on the GPU, with the CUDA context."""
        parts = (self.base, self.adapter, self.gradients, self.optimizer, self.gathered)
        return sum(parts) + self.activations + self.proxy + _CONTEXT_BYTES


def activation_bytes(
    shape: ModelShape,
    config: AdapterConfig,
    kind: str,
    *,
    tokens: int,
    base_bytes: int,
    adapter_bytes: int,
    checkpointing: bool,
    mask_bytes: int = 1,
) -> int:
    """Bytes that autograd saves in the forward pass of one micro-batch.

    Per token and layer, counted from the operations of a Llama-like layer with frozen weights::

        8 h             two normalisations, in float32
        b (4 q + 3 i)   attention with repeated keys and values; gated feed-forward
        c S_in          inputs of the trained A, which are copies in the adapter's dtype
        12 c r m        products in a conventional linear (4 c r m in a block-end one, c r 2 m
                        in plain LoRA), with b and c the bytes of a base and of an adapter value

    and the mask of the dropout in front of every adapter. With checkpointing only each layer's
    input is kept, and one layer's tensors at a time.

    Args:
        shape: the model.
        config: the adapter.
        kind: ``pq_lora`` or ``lora``.
        tokens: of a micro-batch, image tokens included.
        base_bytes: bytes of a value of the base model.
        adapter_bytes: bytes of an adapter's value.
        checkpointing: whether layers are computed again in the backward pass.
        mask_bytes: of a value of a dropout mask: 1 on a GPU, 4 on a processor.
    """
    linears = _carriers(shape, config)
    inputs = sum(linear.in_features for linear in linears) // shape.layers
    count = len(linears) // shape.layers
    base = 8 * shape.hidden + base_bytes * (4 * shape.attention + 3 * shape.inner)
    mask = mask_bytes * inputs if config.dropout > 0 else 0
    products = adapter_bytes * config.rank * count
    conventional = base + mask + adapter_bytes * inputs + (3 if kind == "pq_lora" else 2) * products
    block_end = base + mask + products if kind == "pq_lora" else conventional
    ends = config.num_blocks if kind == "pq_lora" else 0
    logits = min(tokens, _ANSWER_TOKENS) * shape.vocab * (base_bytes + 8)
    if checkpointing:
        kept = shape.layers * base_bytes * shape.hidden + max(conventional, block_end)
        return tokens * kept + logits
    return tokens * (ends * block_end + (shape.layers - ends) * conventional) + logits


def weight_bytes(shape: ModelShape, spec: ModelSpec) -> int:
    """Bytes of a base model's weights; quantisation covers the decoder's linears only."""
    bits = _BITS.get(spec.quantization)
    if bits is None:
        return shape.parameters * BYTES[spec.dtype]
    linears = shape.decoder_parameters
    return int(linears * bits / 8) + (shape.parameters - linears) * BYTES[spec.dtype]


def rank_memory(
    shape: ModelShape,
    size: AdapterSize,
    spec: ModelSpec,
    zero: Zero,
    *,
    activations: int,
    proxy: tuple[ModelShape, ModelSpec] | None = None,
) -> Memory:
    """GPU memory of one rank that trains a client of this model.

    Args:
        shape: the model.
        size: its adapter.
        spec: its dtype.
        zero: how the rank group cuts it.
        activations: see :func:`activation_bytes`.
        proxy: another model that this rank loads for sketches.
    """
    width = BYTES[spec.dtype]
    ranks, stage = zero.ranks, zero.stage
    beside = 0 if proxy is None else weight_bytes(*proxy)
    if stage == 0:
        return Memory(
            base=weight_bytes(shape, spec),
            adapter=4 * size.resident,
            gradients=4 * size.trainable,
            optimizer=_MOMENTS * size.trainable,
            gathered=0,
            activations=activations,
            proxy=beside,
            host=0,
        )
    weights, adapter = weight_bytes(shape, spec), size.resident * width
    gathered = 0
    if stage == 3:
        # DeepSpeed lets gathered weights go once that many are alive.
        gathered = min(weights + adapter, zero.live * width)
        weights, adapter = math.ceil(weights / ranks), math.ceil(adapter / ranks)
    optimizer = math.ceil(_MASTER_AND_MOMENTS * size.trainable / ranks)
    gradients = width * size.trainable
    if stage >= 2:
        gradients = math.ceil(gradients / ranks)
    host = (optimizer if zero.offload_optimizer else 0) + (
        weights + adapter if zero.offload_parameters else 0
    )
    return Memory(
        base=0 if zero.offload_parameters else weights,
        adapter=0 if zero.offload_parameters else adapter,
        gradients=gradients,
        optimizer=0 if zero.offload_optimizer else optimizer,
        gathered=gathered,
        activations=activations,
        proxy=beside,
        host=host,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleWork:
    """What a sample costs.

    Attributes:
        tokens: of the decoder, image tokens included.
        images: images of the sample.
    """

    tokens: int
    images: int


def forward_flops(shape: ModelShape, sample: SampleWork, *, extra: int = 0) -> float:
    """Floating-point operations of one forward pass: 2 per weight and token, and attention.

    Args:
        shape: the model.
        sample: its length.
        extra: adapter parameters that take part.
    """
    decoder = 2.0 * (shape.decoder_parameters + extra) * sample.tokens
    attention = 2.0 * shape.layers * shape.attention * sample.tokens**2
    head = 2.0 * shape.hidden * shape.vocab * min(sample.tokens, _ANSWER_TOKENS)
    vision = 2.0 * shape.vision_parameters * shape.image_tokens * sample.images
    return decoder + attention + head + vision


def training_flops(
    shape: ModelShape, size: AdapterSize, sample: SampleWork, *, checkpointing: bool
) -> float:
    """Operations of one sample's forward and backward pass.

    The base is frozen: its backward pass is as long as its forward pass, that of an adapter twice.
    The vision tower has no backward pass.
    """
    vision = 2.0 * shape.vision_parameters * shape.image_tokens * sample.images
    forward = forward_flops(shape, sample, extra=size.resident) - vision
    weights = 2.0 * size.trainable * sample.tokens
    return forward * (3 if checkpointing else 2) + weights + vision
