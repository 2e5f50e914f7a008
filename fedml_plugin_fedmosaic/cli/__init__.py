"""The ``fedmosaic`` command: the only part that prints, draws and reads the command line."""
