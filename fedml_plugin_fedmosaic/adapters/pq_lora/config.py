"""PEFT configuration of PQ-LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import peft_types

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GATES = ("scalar", "input")


@dataclass
class PQLoraConfig(PeftConfig):  # type: ignore[misc, unused-ignore]
    """What a PQ-LoRA adapter looks like; saved as ``adapter_config.json``.

    Args:
        r: rank.
        lora_alpha: the scaling is ``lora_alpha / r``.
        lora_dropout: dropout probability on the adapter's input; one mask for both branches.
        num_blocks: blocks per model; the last layer of each block carries PQ-LoRA, all other
            layers carry conventional LoRA.
        num_layers: decoder layers; read from the model when omitted.
        gate: ``scalar`` (one learnable number per linear) or ``input`` (one number per sequence
            from the mean input, as in the released code).
        gate_noise: add the released code's noise to the input gate while training. Off by
            default: its scale has no gradient there, so it stays at softplus(0).
        target_modules: last names of the linears of a decoder layer that carry adapters.
        init_seed: seed of the initial A and B.

    Raises:
        AdapterError: a value is out of range.
    """

    r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: float = field(default=32.0, metadata={"help": "scaling times rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the input"})
    num_blocks: int = field(default=4, metadata={"help": "blocks per model"})
    num_layers: int | None = field(default=None, metadata={"help": "decoder layers"})
    gate: str = field(default="scalar", metadata={"help": "scalar or input"})
    gate_noise: bool = field(default=False, metadata={"help": "noise on the input gate"})
    target_modules: Any = field(default=DEFAULT_TARGETS, metadata={"help": "linears to adapt"})
    init_seed: int = field(default=0, metadata={"help": "seed of the initial A and B"})

    def __post_init__(self) -> None:
        """Checks values and sets the PEFT type."""
        super().__post_init__()
        self.peft_type = peft_types.PeftType.PQ_LORA
        names = self.target_modules
        self.target_modules = [names] if isinstance(names, str) else sorted(set(names or ()))
        problems = [
            text
            for bad, text in (
                (self.r < 1, f"r must be at least 1, got {self.r}"),
                (self.lora_alpha <= 0, f"lora_alpha must be positive, got {self.lora_alpha}"),
                (
                    not 0 <= self.lora_dropout < 1,
                    f"lora_dropout must be in [0, 1), got {self.lora_dropout}",
                ),
                (
                    self.gate not in GATES,
                    f"gate must be one of {', '.join(GATES)}, got {self.gate!r}",
                ),
                (not self.target_modules, "target_modules must name at least one linear"),
            )
            if bad
        ]
        if problems:
            raise AdapterError(f"PQ-LoRA configuration: {'; '.join(problems)}")
        if self.num_layers is not None:
            block_end_layers(self.num_layers, self.num_blocks)

    @property
    def scaling(self) -> float:
        """Factor on what an adapter adds."""
        return self.lora_alpha / self.r
