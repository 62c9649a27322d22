"""Kernels: an operation's reads, writes, kept tensors and scratch, each with its source."""
