"""The mathematics of the papers: one function per equation, tensors in and out, no state."""
