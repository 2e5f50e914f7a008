"""YAML to typed, frozen sections."""
