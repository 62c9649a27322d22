"""Fake tensors and devices: what torch must believe so that a step runs without data or a GPU."""
