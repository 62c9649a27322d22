"""The answer: how much memory a run takes, when, of which tensors, and whether it fits."""
