"""Quantised weights: formats, storage, and the kernels that run them."""
