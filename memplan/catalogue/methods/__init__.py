"""Training methods as rewrites of a stack: adapters, freezing, merging and saving."""
