"""The bundled quickstart: a small federation of real images."""
