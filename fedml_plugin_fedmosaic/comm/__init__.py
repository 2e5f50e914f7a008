"""Shelf of communicators: they move headers and tensors and never know why."""
