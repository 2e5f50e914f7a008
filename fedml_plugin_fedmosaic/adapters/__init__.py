"""Shelf of adapters: put into a model, read, write, choose branches."""

from __future__ import annotations

from fedml_plugin_fedmosaic.core.quiet import hush_libraries

hush_libraries()
