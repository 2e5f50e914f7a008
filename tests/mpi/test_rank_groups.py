"""Rank groups under mpirun: the bits of one process, on leaders and members alike."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("groups_program.py")
SUPPORT = Path(__file__).parents[1] / "support"


def run_groups(sizes: list[int]) -> list[dict]:
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        ["mpiexec", "-n", str(sum(sizes)), sys.executable, PROGRAM, ",".join(map(str, sizes))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(text) for text in re.findall(r"RANK(\{.*?\})$", done.stdout, re.M)]
    return sorted(records, key=lambda record: record["rank"])


SIZES = [2, 1, 1]
pytestmark = pytest.mark.mpi(4)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return run_groups(SIZES)


def test_every_rank_of_a_group_sees_the_bits_of_one_process(records: list[dict]) -> None:
    assert [record["rank"] for record in records] == [0, 1, 2, 3]
    # group, groups, rank in the group, size of the group
    places = [[0, 3, 0, 2], [0, 3, 1, 2], [1, 3, 0, 1], [2, 3, 0, 1]]
    assert [record["group"] for record in records] == places
    assert [record["leader"] for record in records] == [True, False, True, True]
    assert all(record["compared"] > 0 for record in records)
    assert records[0]["compared"] == records[1]["compared"]


def test_the_ranks_of_a_group_meet_at_one_place(records: list[dict]) -> None:
    first, second, alone, _ = (record["places"] for record in records)
    for one, other in zip(first, second, strict=True):
        assert one[:3] == [0, 2, 0]
        assert other[:3] == [1, 2, 1]
        assert one[3:] == other[3:]
    assert [place[:3] for place in alone] == [[0, 1, 0]] * 2
    assert {place[3] for place in first + alone} == {"127.0.0.1"}
    assert all(1024 <= place[4] < 65536 for place in first + alone)
    assert first[0][4] != first[1][4]
