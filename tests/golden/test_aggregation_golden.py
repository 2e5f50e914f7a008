"""The global branches of the released code, rebuilt from relevance weights and mixing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.equations.blocks import block_end_layers
from fedml_plugin_fedmosaic.equations.mixing import mix
from fedml_plugin_fedmosaic.equations.relevance import relevance_weights

ARRAYS = np.load(Path(__file__).parent / "aggregation.npz", allow_pickle=False)
DEPTH = {"S": 4, "M": 7, "X": 9}
NUM_BLOCKS, TEMPERATURE = 2, 0.5


def _upload(case: str, client: int, layer: int, module: str, part: str) -> Tensor:
    prefix = f"{case}/c{client}/in/{layer}.{module}.lora2_{part}.default"
    name = prefix if prefix in ARRAYS else f"{prefix}.weight"
    return torch.from_numpy(ARRAYS[name])


def _mixed(uploads: dict[int, Tensor], weights: Tensor) -> Tensor:
    """One receiver's sum over the clients with a weight, in ascending order."""
    senders = [client for client in sorted(uploads) if weights[client] > 0]
    sources = [uploads[client].flatten() for client in senders]
    row = weights[torch.tensor(senders)].unsqueeze(0)
    return mix(sources, row)[0].reshape(uploads[senders[0]].shape)


def _expected(case: str, client: int) -> dict[tuple[int, str, str], np.ndarray]:
    found = {}
    start = f"{case}/c{client}/out/"
    for name in ARRAYS.files:
        if name.startswith(start):
            layer, block, linear, parameter, *_ = name[len(start) :].split(".")
            found[int(layer), f"{block}.{linear}", parameter.removeprefix("lora1_")] = ARRAYS[name]
    return found


@pytest.mark.parametrize("case", ["two", "three"])
def test_global_branches_across_architectures(case: str) -> None:
    specs = ARRAYS[f"{case}/spec"].tolist()
    similarity = torch.from_numpy(ARRAYS[f"{case}/sim"])
    everyone = relevance_weights(similarity, TEMPERATURE)
    np.testing.assert_allclose(everyone.numpy(), ARRAYS[f"{case}/weights"], rtol=0, atol=1e-12)
    ends = [block_end_layers(DEPTH[spec], NUM_BLOCKS) for spec in specs]
    checked = 0
    for client, spec in enumerate(specs):
        peers = [other for other, theirs in enumerate(specs) if theirs == spec]
        alike = relevance_weights(similarity, TEMPERATURE, peers)
        if len(peers) > 1:
            reference = ARRAYS[f"{case}/homo_weights"][client]
            np.testing.assert_allclose(alike[client].numpy(), reference, rtol=0, atol=1e-12)
        for (layer, module, part), expected in _expected(case, client).items():
            at_end = layer in ends[client]
            if at_end and part in "PQ":
                block = ends[client].index(layer)
                uploads = {
                    other: _upload(case, other, ends[other][block], module, part)
                    for other in range(len(specs))
                }
                got = _mixed(uploads, everyone[client])
            elif at_end or len(peers) == 1:
                got = _upload(case, client, layer, module, part)
            else:
                uploads = {other: _upload(case, other, layer, module, part) for other in peers}
                got = _mixed(uploads, alike[client])
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)
            checked += 1
    assert checked == 8 * sum(DEPTH[spec] for spec in specs)


def test_last_p_of_bfloat16_uploads() -> None:
    specs = ARRAYS["two/spec"].tolist()
    weights = relevance_weights(torch.from_numpy(ARRAYS["two/sim"]), TEMPERATURE)
    for client in range(len(specs)):
        uploads = {
            other: _upload("two", other, DEPTH[spec] - 1, "mlp.down_proj", "P").bfloat16()
            for other, spec in enumerate(specs)
        }
        got = _mixed(uploads, weights[client])
        expected = ARRAYS[f"two/c{client}/out_bf16_lastP"]
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("cohort", [(0, 1, 2, 3), (0, 2, 3)])
def test_global_branches_within_one_architecture(cohort: tuple[int, ...]) -> None:
    similarity = torch.from_numpy(ARRAYS["homo/sim"])
    released = relevance_weights(similarity, TEMPERATURE)
    ours = relevance_weights(similarity, TEMPERATURE, cohort)
    case = "homo/sel" + "".join(map(str, cohort))
    for client in cohort:
        # The released code normalises over all clients, whoever takes part.
        taking_part = sum(float(released[client, other]) for other in cohort)
        assert float(ours[client].sum()) == pytest.approx(1, abs=1e-12)
        assert (taking_part < 0.999) == (len(cohort) < 4)
        for (layer, module, part), expected in _expected(case, client).items():
            uploads = {other: _upload("homo", other, layer, module, part) for other in cohort}
            got = _mixed(uploads, ours[client])
            np.testing.assert_allclose(got.numpy(), expected / taking_part, rtol=1e-5, atol=1e-5)
