"""Serving engines: settings, weights of a rank, steps, budget and pool."""
