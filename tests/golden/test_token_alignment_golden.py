from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedml_plugin_fedmosaic.equations.token_alignment import aligned_positions, pooled_rows

ARRAYS = np.load(Path(__file__).parent / "align_choices.npz", allow_pickle=False)


@pytest.mark.parametrize("case", range(5))
def test_positions_and_pooled_rows_equal_the_reference(case: int) -> None:
    first, second = (ARRAYS[f"align{case}/{name}"].tolist() for name in ("base", "blend"))
    positions = aligned_positions(first, second, official=True)
    assert positions == json.loads(str(ARRAYS[f"align{case}/map_json"]))
    hidden = torch.from_numpy(ARRAYS[f"align{case}/hidden"])
    rows, kept = pooled_rows(hidden[None], [positions])
    keep = ARRAYS[f"align{case}/keep"].astype(np.int64)
    assert kept[:, 1].tolist() == keep.tolist()
    np.testing.assert_allclose(rows.numpy(), ARRAYS[f"align{case}/aligned"][keep], rtol=1e-12)
