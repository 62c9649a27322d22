"""Parallelism: how ranks divide matrices, experts, sequences, layers and states."""
