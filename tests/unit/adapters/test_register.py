from __future__ import annotations

import enum
import json

import peft
import pytest
from peft import mapping
from peft.utils.peft_types import PeftType, register_peft_method

from fedml_plugin_fedmosaic.adapters.pq_lora import PQLoraConfig, PQLoraModel, register
from fedml_plugin_fedmosaic.core.errors import IntegrationError


def test_peft_knows_the_method_as_it_knows_its_own() -> None:
    member = PeftType("PQ_LORA")
    assert member is PeftType.PQ_LORA is PeftType["PQ_LORA"]
    assert "PQ_LORA" in list(PeftType)
    assert json.dumps(member) == '"PQ_LORA"'
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PQ_LORA"] is PQLoraConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is PQLoraModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["PQ_LORA"] == "pq_lora_"
    assert PQLoraConfig().peft_type is member


def test_the_installed_peft_still_refuses_unknown_names() -> None:
    # When this fails, PEFT has opened its enumeration: register.extend_enum can go.
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        register_peft_method(name="unheard_of", config_cls=PQLoraConfig, model_cls=PQLoraModel)


def test_registering_twice_changes_nothing() -> None:
    before = list(PeftType)
    register.register(PQLoraConfig, PQLoraModel)
    assert list(PeftType) == before


def test_a_peft_with_its_own_pq_lora_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.PQ_LORA, peft.LoraConfig)
    with pytest.raises(IntegrationError, match="already belongs to") as caught:
        register.register(PQLoraConfig, PQLoraModel)
    assert peft.__version__ in str(caught.value)
    assert "pip install" in str(caught.value)


def test_a_peft_that_dropped_the_enumeration_is_refused() -> None:
    with pytest.raises(IntegrationError, match="not a string enumeration"):
        register.extend_enum(dict, "PQ_LORA")
    with pytest.raises(IntegrationError, match="not a string enumeration"):
        register.extend_enum(None, "PQ_LORA")


def test_a_member_of_the_same_name_is_refused() -> None:
    colour = enum.Enum("colour", {"PQ_LORA": "PQ_LORA"}, type=str)
    with pytest.raises(IntegrationError, match="already has a member"):
        register.extend_enum(colour, "PQ_LORA")


def test_a_door_that_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("closed")

    monkeypatch.delitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.PQ_LORA)
    monkeypatch.setattr(register, "extend_enum", lambda *_: None)
    monkeypatch.setattr(register.peft_types, "register_peft_method", refuse)
    with pytest.raises(IntegrationError, match="refuses it: closed"):
        register.register(PQLoraConfig, PQLoraModel)


def test_extended_enumerations_behave(monkeypatch: pytest.MonkeyPatch) -> None:
    words = enum.Enum("words", {"ONE": "ONE"}, type=str)
    register.extend_enum(words, "TWO")
    assert [member.value for member in words] == ["ONE", "TWO"]
    assert words("TWO") is words["TWO"] is words.TWO  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="THREE"):
        words("THREE")
