"""One aggregation of FedMosaic against arrays computed by the published code, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.codec import Layout
from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    Branch,
    ClientManifest,
    Part,
    UpdateHeader,
    channel_of,
)
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers
from fedml_plugin_fedmosaic.strategies.fedmosaic import FedMosaic, FedMosaicOptions

GOLDEN = Path(__file__).parents[1] / "golden" / "aggregation.npz"
LAYERS = {"S": 4, "M": 7, "X": 9}
NUM_BLOCKS = 2
# Sketches and sums are float32 here and float64 in the file.
TOLERANCE = 2e-6


def tensors_of(case: Mapping[str, np.ndarray], spec: str, prefix: str) -> dict[str, Tensor]:
    """The file's ``<layer>.<module>.lora*_<part>...`` arrays by share key.

    Layers at a block's end share P and Q, the others A and B; the rest is never sent.
    """
    ends = block_end_layers(LAYERS[spec], NUM_BLOCKS)
    found: dict[str, Tensor] = {}
    for name, array in case.items():
        if not name.startswith(prefix):
            continue
        layer_text, _, module, branch_part, *_ = name.removeprefix(prefix).split(".")
        layer, part = int(layer_text), Part(branch_part.partition("_")[2])
        is_end = layer in ends
        if (part in (Part.P, Part.Q)) != is_end:
            continue
        block = ends.index(layer) if is_end else 0
        key = AdapterKey(block, layer, module, Branch.LOCAL, part)
        value = torch.from_numpy(array).double()
        found[key.share_key] = value.reshape(-1) if part is Part.Q else value
    assert found
    return found


def sketches_with(similarity: np.ndarray) -> list[Tensor]:
    """One-column sketches whose cosines are a given positive definite matrix."""
    return [torch.from_numpy(row).float()[:, None] for row in np.linalg.cholesky(similarity)]


@pytest.mark.parametrize("case_name", ["two", "three"])
def test_received_tensors_equal_the_published_ones(case_name: str) -> None:
    with np.load(GOLDEN) as arrays:
        case = {
            name.removeprefix(f"{case_name}/"): arrays[name]
            for name in arrays.files
            if name.startswith(f"{case_name}/")
        }
    specs = [str(spec) for spec in case["spec"]]
    sent = [tensors_of(case, spec, f"c{i}/in/") for i, spec in enumerate(specs)]
    uploads = {
        i: {key: tensor.float() for key, tensor in tensors.items()}
        for i, tensors in enumerate(sent)
    }
    manifests = [
        ClientManifest(
            client_id=i,
            model=spec,
            family="golden",
            signature=spec,
            num_layers=LAYERS[spec],
            num_blocks=NUM_BLOCKS,
            num_examples=1,
            tasks=(),
            layouts={
                channel: Layout.of(
                    {key: value for key, value in uploads[i].items() if channel_of(key) == channel}
                ).digest
                for channel in ("pq", "conv")
            },
        )
        for i, spec in enumerate(specs)
    ]
    strategy = FedMosaic(FedMosaicOptions(temperature=float(case["T_nb_r"][0])))
    sketches = dict(enumerate(sketches_with(case["sim"])))
    headers = [
        UpdateHeader(client_id=i, round_idx=0, num_examples=1, sketch=sketch)
        for i, sketch in sketches.items()
    ]
    comm = LocalCommunicator()
    state = strategy.init(manifests, seed=0)
    relevance = comm.relevance("columns", sketches, list(sketches))
    _, plan = strategy.plan(state, comm.exchange_headers(headers), relevance)
    downlinks = comm.execute(plan, uploads)

    assert plan.weights is not None
    torch.testing.assert_close(
        plan.weights.double(), torch.from_numpy(case["weights"]), rtol=0, atol=1e-6
    )
    for i, spec in enumerate(specs):
        expected = tensors_of(case, spec, f"c{i}/out/")
        alone = specs.count(spec) == 1
        received = downlinks[i]
        assert set(received) == {key for key in expected if not (alone and key.startswith("conv"))}
        for key, tensor in expected.items():
            got = received.get(key, uploads[i][key])  # without a row the own tensor stays
            torch.testing.assert_close(got.double(), tensor, rtol=0, atol=TOLERANCE)
