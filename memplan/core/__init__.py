"""Foundations: errors, bytes, frozen values, and the operations that models are described with."""
