from __future__ import annotations

from dataclasses import replace

import pytest

from fedml_plugin_fedmosaic.config.sections import AdapterConfig, Experiment
from fedml_plugin_fedmosaic.core.registry import ADAPTERS
from fedml_plugin_fedmosaic.runtime.alignment import wants_alignment


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_only_an_adapter_with_p_and_q_takes_aligned_factors(adapter: str) -> None:
    """Baselines with plain LoRA are compared in the same run as FedMosaic with its alignment."""
    experiment = Experiment(adapter=AdapterConfig(alignment="aligned"))
    assert wants_alignment(experiment, adapter) == (adapter == "pq_lora")
    without = replace(experiment, adapter=AdapterConfig())
    assert not wants_alignment(without, adapter)
