"""Parts that decoders share: frame, attention, MLP, norms, rotation, heads for other tasks."""
