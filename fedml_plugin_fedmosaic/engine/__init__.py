"""Local training, sketches and evaluation of one model."""
