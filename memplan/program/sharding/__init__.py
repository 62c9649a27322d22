"""Sharding: which part of weights, gradients and states each rank holds, and when it gathers them."""
