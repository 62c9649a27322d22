"""Fake tensors and devices: patches that let a step run without data or a GPU."""
