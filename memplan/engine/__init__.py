"""The interpreter of `memplan.core.ir`: which tensors are alive when, and how many bytes they take.

Nothing here depends on a model or a method.
"""
