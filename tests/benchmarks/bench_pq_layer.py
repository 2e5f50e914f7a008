"""Cost of the adapter layers against PEFT's plain LoRA of the same rank.

Prints forward+backward time (median over interleaved repetitions) and memory, each with its ratio
to plain LoRA. Run it alone on a quiet machine::

    python tests/benchmarks/bench_pq_layer.py --threads 1

Two memories are shown. *kept*: bytes that autograd keeps between forward and backward, parameters
apart, counted by storage; layers that train A keep their input. *peak*: the largest sum of live
storages that forward and backward made, counted at every operation, so that it does not depend on
the allocator. As inside a network, the input needs gradients, and all layers train what they train
in a run: plain LoRA its A and B, the others their local branch and gate while the global branch is
frozen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedml_plugin_fedmosaic.adapters.pq_lora import PQLoraConfig, PQLoraLayer
from fedml_plugin_fedmosaic.adapters.pq_lora.context import ForwardContext

LIMITS = {"pq scalar": 1.10, "dual scalar": 1.35}


class LiveBytes(TorchDispatchMode):
    """Sum of the bytes of all live storages made inside the context, and its maximum."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = 0
        self.peak = 0

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


def kept_bytes(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, without the tensors in ``known``."""
    skip = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(kept.values())


def build(width: int, rank: int, generator: torch.Generator) -> dict[str, nn.Module]:
    """The layers to compare, all around equal frozen linears."""

    def linear() -> nn.Linear:
        base = nn.Linear(width, width, bias=False)
        base.weight.data = torch.randn(width, width, generator=generator) / width**0.5
        return base.requires_grad_(False)

    holder = nn.Sequential(linear())
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]), holder)
    layers: dict[str, nn.Module] = {"plain LoRA": holder[0]}
    for gate in ("scalar", "input"):
        for is_pq in (True, False):
            layers[f"{'pq' if is_pq else 'dual'} {gate}"] = PQLoraLayer(
                linear(),
                "default",
                PQLoraConfig(r=rank, lora_alpha=2 * rank, gate=gate),
                block=0,
                layer=0,
                module="0",
                is_pq=is_pq,
                context=ForwardContext(),
            )
    for layer in layers.values():
        for name, parameter in layer.named_parameters():
            if "base_layer" not in name and "gate" not in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return layers


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """One forward and backward pass; gradients are dropped."""
    layer(x).backward(grad)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def measure(args: argparse.Namespace) -> dict[str, tuple[float, int, int]]:
    """Seconds, kept bytes and peak bytes per layer."""
    generator = torch.Generator().manual_seed(0)
    layers = build(args.width, args.rank, generator)
    shape = (1, args.tokens, args.width)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    grad = torch.randn(shape, generator=generator)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repetition in range(args.repetitions + 3):
        # Rotated, so that no layer always follows the same one.
        names = list(layers)
        start_at = repetition % len(names)
        for name in names[start_at:] + names[:start_at]:
            start = time.perf_counter()
            step(layers[name], x, grad)
            if repetition >= 3:
                times[name].append(time.perf_counter() - start)
    result = {}
    for name, layer in layers.items():
        known = [x, grad, *layer.parameters()]

        def forward(layer: nn.Module = layer) -> Tensor:
            return layer(x)

        kept = kept_bytes(forward, list(layer.parameters()))
        with LiveBytes(known) as live:
            step(layer, x, grad)
        result[name] = (statistics.median(times[name]), kept, live.peak)
    return result


def main() -> int:
    """Prints the table; exits with 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args)
    base = result["plain LoRA"]
    print(f"d={args.width} r={args.rank} tokens={args.tokens} threads={args.threads} float32")
    print("layer", " " * 15, "ms   ratio  kept MiB   ratio  peak MiB   ratio")
    failed = False
    for name, row in result.items():
        ratios = [value / reference for value, reference in zip(row, base, strict=True)]
        print(
            f"{name:<14}{row[0] * 1e3:>9.2f}{ratios[0]:>8.3f}{row[1] / 2**20:>10.2f}"
            f"{ratios[1]:>8.3f}{row[2] / 2**20:>10.2f}{ratios[2]:>8.3f}"
        )
        limit = LIMITS.get(name)
        failed |= limit is not None and max(ratios[0], ratios[2]) > limit
    print(f"limits on time and peak: {LIMITS} -> {'exceeded' if failed else 'hold'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
