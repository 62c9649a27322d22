"""Optimizers: their states and the temporaries of a step."""
