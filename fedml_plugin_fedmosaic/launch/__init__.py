"""How jobs start."""
