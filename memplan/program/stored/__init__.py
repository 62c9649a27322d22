"""Weights as a checkpoint stores them."""
