"""Inference: passes, rounds of assisted generation, and the allocator's replay."""
