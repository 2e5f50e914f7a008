"""``python -m fedml_plugin_fedmosaic`` is the ``fedmosaic`` command."""

from __future__ import annotations

from fedml_plugin_fedmosaic.cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m fedml_plugin_fedmosaic")
