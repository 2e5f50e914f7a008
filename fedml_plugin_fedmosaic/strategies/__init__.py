"""Shelf of strategies: each is one pure file with a server half and a client half."""
