"""Shelf of adapters: put into a model, read, write, choose branches."""
