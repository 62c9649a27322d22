"""Refusals by concern: what contradicts itself, what is not supported yet, what would have no effect.

No field is ever ignored: one that cannot do what it says is an error that names it.
"""
