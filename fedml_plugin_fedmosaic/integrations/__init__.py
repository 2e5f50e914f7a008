"""Doors of host frameworks."""
