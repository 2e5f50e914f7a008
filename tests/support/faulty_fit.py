"""Clients of the tiny world that fail on request: real failures at a chosen time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedml_plugin_fedmosaic.core.types import AdapterState
from fedml_plugin_fedmosaic.core.work import LocalResult, Pass
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

Plan = Mapping[tuple[int, int], str]
"""(client, its how-manieth call of ``fit``, from 0) -> kind of failure."""

REASONS = {
    "oom": "OutOfMemoryError: CUDA out of memory",
    "memory": "MemoryError",
    "data": "expected an answer to learn from",
    "explode": "NonFiniteLossError",
}


def _without_answer(batches: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The same batches; the last sample has nothing to learn from."""
    copied = [list(batch) for batch in batches]
    broken = copied[-1][-1]
    copied[-1][-1] = replace(broken, turns=broken.turns[:1])
    return copied


def faulty_fit(plan: Plan) -> Callable[..., LocalResult]:
    """A ``TorchEngine.fit`` that fails as planned; clients are told apart by their task."""
    fit = TorchEngine.fit
    calls: Counter[int] = Counter()

    def fit_or_fail(
        self: TorchEngine,
        pass_: Pass,
        adapter: AdapterState,
        batches: Sequence[Sequence[Sample]],
        **options: Any,
    ) -> LocalResult:
        client = int(batches[0][0].task.removeprefix("Pets").partition("-")[0])
        kind = plan.get((client, calls[client]), "")
        calls[client] += 1
        match kind:
            case "data":
                batches = _without_answer(batches)
            case "explode":
                pass_ = replace(pass_, lr_scale=1e35)
        result = fit(self, pass_, adapter, batches, **options)
        if kind == "bug":
            raise AssertionError("no client's fault")
        # Memory ends after the work is done, when there is most to clean up.
        match kind:
            case "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case "memory":
                raise MemoryError
        return result

    return fit_or_fail
