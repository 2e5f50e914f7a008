"""Errors, seeds, keys and events: the small words everything else uses."""

from __future__ import annotations

import json
import random
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core import errors, events
from fedml_plugin_fedmosaic.core.rng import derive_seed, python_random, torch_generator
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, Part, channel_of


def test_the_error_tree_has_one_root_and_documented_exit_codes() -> None:
    found = {
        name: cls.exit_code
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.FedMosaicError)
    }
    assert found == {
        "FedMosaicError": 1,
        "ConfigError": 2,
        "RegistryError": 2,
        "DataError": 2,
        "AdapterError": 3,
        "PlanError": 3,
        "ClientFailure": 4,
        "QuorumError": 4,
        "CommError": 5,
        "LaunchError": 6,
        "CheckpointError": 7,
        "RunInUse": 7,
        "IntegrationError": 8,
        "OutOfMemory": 9,
        "RunInterrupted": 75,
    }


def test_an_error_shows_its_hint() -> None:
    assert str(errors.ConfigError("wrong", hint="do this")) == "wrong\n  -> do this"
    assert str(errors.ConfigError("wrong")) == "wrong"


def test_a_client_failure_counts_rounds_from_one() -> None:
    assert str(errors.ClientFailure(3, 0, "fit", "boom")) == "client 3, round 1, fit: boom"


def test_seeds_are_fixed_for_ever() -> None:
    # A change here changes every published number.
    assert derive_seed(0, "fit", 1, 2) == 8170521115649252349
    assert 0 <= derive_seed(7) < 2**63


PATHS = st.lists(st.one_of(st.text(max_size=5), st.integers(-9, 9)), max_size=3)


@given(PATHS, PATHS)
def test_different_purposes_have_different_seeds(left: list[str | int], right: list[str | int]):
    same = [(type(part), part) for part in left] == [(type(part), part) for part in right]
    plain = all("/" not in str(part) and ":" not in str(part) for part in [*left, *right])
    if same:
        assert derive_seed(1, *left) == derive_seed(1, *right)
    elif plain:
        assert derive_seed(1, *left) != derive_seed(1, *right)


def test_generators_do_not_touch_the_global_state() -> None:
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    first = torch.rand(3, generator=torch_generator(1, "a"))
    again = torch.rand(3, generator=torch_generator(1, "a"))
    other = torch.rand(3, generator=torch_generator(1, "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert python_random(1, "a").random() == python_random(1, "a").random()
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before


KEYS = st.builds(
    AdapterKey,
    block=st.integers(0, 99),
    layer=st.integers(0, 999),
    module=st.sampled_from(["q_proj", "down_proj"]),
    branch=st.sampled_from(Branch),
    part=st.sampled_from(Part),
)


@given(KEYS)
def test_an_adapter_key_is_read_back(key: AdapterKey) -> None:
    assert AdapterKey.parse(str(key)) == key
    pq = key.part in (Part.P, Part.Q)
    assert channel_of(key.share_key) == ("pq" if pq else "conv")
    assert key.share_key.split("/")[1] == str(key.block if pq else key.layer)


@pytest.mark.parametrize("text", ["", "0/1/q_proj/local", "x/1/q_proj/local/A", "0/1/q/left/A"])
def test_a_broken_adapter_key_is_refused(text: str) -> None:
    with pytest.raises(errors.AdapterError, match="is not an adapter key"):
        AdapterKey.parse(text)


def test_an_event_becomes_json_with_its_type() -> None:
    event = events.RoundFinished(
        strategy="local", round_idx=1, duration_s=2.5, uplink_bytes={0: 4}, downlink_bytes={}
    )
    record = json.loads(json.dumps(events.to_record(event)))
    assert record["event"] == "RoundFinished"
    assert record["uplink_bytes"] == {"0": 4}
    assert set(record) == {"event", *(item.name for item in fields(event))}
