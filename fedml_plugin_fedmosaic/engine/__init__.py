"""Local training, sketches and evaluation of one model."""

from __future__ import annotations

from fedml_plugin_fedmosaic.core.quiet import hush_libraries

hush_libraries()
