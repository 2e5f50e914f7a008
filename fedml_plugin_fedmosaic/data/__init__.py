"""Data sets, how their samples are put in order over time, and how answers are scored."""
