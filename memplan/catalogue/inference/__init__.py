"""Inference: one pass, caches of keys and values, decoding, and a serving engine's step."""
