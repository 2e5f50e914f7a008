"""The one place that adds a name to PEFT: ``PeftType.PQ_LORA``.

PEFT's door for new methods, ``register_peft_method``, takes only names that are in its closed
enumeration ``PeftType``. So the enumeration gets one more member first; everything after that goes
through the door. Each step is checked, and a PEFT that works differently is refused.
"""

from __future__ import annotations

from typing import Any

import peft
from peft import mapping
from peft.utils import peft_types

from fedml_plugin_fedmosaic.core.errors import IntegrationError

METHOD = "pq_lora"
PEFT_TYPE = METHOD.upper()
PREFIX = f"{METHOD}_"


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Makes PQ-LoRA known to PEFT; does nothing the second time.

    Args:
        config_cls: PEFT configuration class.
        model_cls: PEFT tuner class.

    Raises:
        IntegrationError: the installed PEFT is built differently, or has another method of this
            name.
    """
    registered = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE)
    if registered is config_cls:
        return
    if registered is not None:
        raise _refusal(f"the method {METHOD!r} already belongs to {registered.__module__}")
    extend_enum(peft_types.PeftType, PEFT_TYPE)
    try:
        peft_types.register_peft_method(
            name=METHOD, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _refusal(f"register_peft_method refuses it: {error}") from error
    if mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(PEFT_TYPE) is not model_cls:
        raise _refusal("register_peft_method did not register it")


def extend_enum(enum_cls: Any, name: str) -> None:
    """Adds the member ``name = "name"`` to a string enumeration.

    Args:
        enum_cls: subclass of ``str`` and ``enum.Enum``.
        name: name and value of the new member.

    Raises:
        IntegrationError: the class is no such enumeration, or the member does not behave like its
            siblings afterwards.
    """
    tables = ("_member_map_", "_member_names_", "_value2member_map_")
    if (
        not isinstance(enum_cls, type)
        or not issubclass(enum_cls, str)
        or not all(hasattr(enum_cls, table) for table in tables)
    ):
        raise _refusal(f"{enum_cls!r} is not a string enumeration")
    known: Any = enum_cls
    if name in known._member_map_:
        raise _refusal(f"{known.__name__} already has a member {name}")
    member: Any = str.__new__(enum_cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_cls
    member._sort_order_ = len(known._member_names_)
    # The attribute first: an enumeration refuses to overwrite members that it already lists.
    setattr(known, name, member)
    known._member_map_[name] = member
    known._value2member_map_[name] = member
    known._member_names_.append(name)
    behaves = (
        known(name) is member
        and known[name] is member
        and getattr(known, name) is member
        and member in list(known)
        and name in list(known)
        and member.value == member.name == name
        and hash(member) == hash(name)
    )
    if not behaves:
        raise _refusal(f"a member added to {known.__name__} does not behave like the others")


def _refusal(reason: str) -> IntegrationError:
    return IntegrationError(
        f"PEFT {peft.__version__} cannot take the method {METHOD!r}: {reason}",
        hint="install the PEFT version that this package asks for: pip install 'peft>=0.21,<0.22'",
    )
