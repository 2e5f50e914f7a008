"""The words of the house: types, errors, registries, seeds and events."""
