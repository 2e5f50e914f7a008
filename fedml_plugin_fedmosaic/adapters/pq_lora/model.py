"""The PEFT tuner that puts PQ-LoRA layers into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from fedml_plugin_fedmosaic.adapters.handle import raise_problems
from fedml_plugin_fedmosaic.adapters.pq_lora.config import PQLoraConfig
from fedml_plugin_fedmosaic.adapters.pq_lora.context import ForwardContext, attach
from fedml_plugin_fedmosaic.adapters.pq_lora.factors import check_rank
from fedml_plugin_fedmosaic.adapters.pq_lora.layer import PQLoraLayer
from fedml_plugin_fedmosaic.adapters.pq_lora.register import PREFIX
from fedml_plugin_fedmosaic.adapters.structure import Target, TextTower, find_text_tower
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers, block_of_layer


def find_targets(config: PQLoraConfig, model: nn.Module) -> TextTower:
    """Finds the linears to adapt and checks that the adapter fits them, changing nothing.

    Args:
        config: what the adapter looks like; its ``num_layers`` is filled in.
        model: the model, plain or with adapters.

    Returns:
        The text tower and its targets.

    Raises:
        AdapterError: the model has fewer layers than blocks, a target module is missing, or the
            rank does not fit a PQ layer.
    """
    tower = find_text_tower(model, config.target_modules, config.num_layers)
    config.num_layers = tower.num_layers
    ends = set(block_end_layers(tower.num_layers, config.num_blocks))
    problems: list[str] = []
    hint = None
    for target in tower.targets:
        if target.layer in ends:
            try:
                check_rank(
                    config.r,
                    target.in_features,
                    target.out_features,
                    f"layer {target.layer}, {target.module}",
                )
            except AdapterError as error:
                problems.append(error.message)
                hint = hint or error.hint
    raise_problems("the adapter does not fit the model", problems, hint)
    return tower


class PQLoraModel(BaseTuner):  # type: ignore[misc, unused-ignore]
    """Wraps a model; made by ``peft.get_peft_model(model, PQLoraConfig(...))``."""

    prefix = PREFIX
    tuner_layer_cls = PQLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_model(self, peft_config: PQLoraConfig, model: nn.Module) -> None:
        tower = find_targets(peft_config, model)
        self._targets: dict[str, Target] = {target.name: target for target in tower.targets}
        if not hasattr(self, "_context"):
            self._context = ForwardContext()
            self._hooks: list[Any] = []
        if peft_config.gate == "input" and not self._hooks:
            self._hooks = attach(self._context, model.get_submodule(tower.name))

    def _check_target_module_exists(self, peft_config: PQLoraConfig, key: str) -> bool:
        """By position in the text tower, so that a vision tower's namesakes are left alone."""
        del peft_config
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: PQLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = self._targets.get(current_key)
        if place is None or parameter_name is not None or peft_config.num_layers is None:
            raise AdapterError(
                f"{current_key!r} is not a target of this PQ-LoRA configuration",
                hint="the saved adapter belongs to another architecture or configuration",
            )
        ends = block_end_layers(peft_config.num_layers, peft_config.num_blocks)
        block = block_of_layer(place.layer, peft_config.num_layers, peft_config.num_blocks)
        is_pq = place.layer in ends
        if isinstance(target, PQLoraLayer):
            target.update_layer(adapter_name, peft_config, block=block, is_pq=is_pq)
            return
        created = PQLoraLayer(
            target,
            adapter_name,
            peft_config,
            block=block,
            layer=place.layer,
            module=place.module,
            is_pq=is_pq,
            context=self._context,
        )
        if adapter_name not in self.active_adapters:
            created.requires_grad_(False)
        self._replace_module(parent, target_name, created, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around ``forward`` and ``generate`` with their arguments.

        While a text is generated without a cache, each pass reads prompt and generated tokens; the
        length that was given here tells the input gates where the prompt ends.
        """
        given = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
        sequences = [item for item in (*given, *args[:1]) if isinstance(item, Tensor)]
        outer = self._context.prompt_length
        self._context.prompt_length = (
            sequences[0].shape[1] if sequences and sequences[0].ndim > 1 else None
        )
        try:
            yield
        finally:
            self._context.prompt_length = outer

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        merge = kwargs.get("merge", args[0] if args else True)
        if merge:
            names = kwargs.get("adapter_names") or self.active_adapters
            # Before the first layer is changed: a half-merged model is worse than an error.
            for layer in pq_layers(self.model):
                if layer.view != "base":
                    for name in names:
                        layer.mixed(name)
        unloaded: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return unloaded


def pq_layers(model: nn.Module) -> list[PQLoraLayer]:
    """All adapter layers of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, PQLoraLayer)]
