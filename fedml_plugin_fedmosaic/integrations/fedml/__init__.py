"""FedML's door: the only place that imports fedml."""
