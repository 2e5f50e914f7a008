"""PQ-LoRA (FedMosaic, arXiv 2506.11024; later named Co-LoRA) as a PEFT method.

Importing this package makes the method known to PEFT, so that ``get_peft_model`` takes a
:class:`PQLoraConfig` and ``PeftModel.from_pretrained`` reads a saved adapter.
"""

from __future__ import annotations

from fedml_plugin_fedmosaic.adapters.pq_lora import register as _register
from fedml_plugin_fedmosaic.adapters.pq_lora.config import PQLoraConfig
from fedml_plugin_fedmosaic.adapters.pq_lora.inject import PQLoraHandle, inject_pq_lora
from fedml_plugin_fedmosaic.adapters.pq_lora.layer import PQLoraLayer
from fedml_plugin_fedmosaic.adapters.pq_lora.model import PQLoraModel

_register.register(PQLoraConfig, PQLoraModel)

__all__ = ["PQLoraConfig", "PQLoraHandle", "PQLoraLayer", "PQLoraModel", "inject_pq_lora"]
