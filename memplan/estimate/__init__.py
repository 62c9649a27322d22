"""The answer: how much memory a run takes, when, which tensors take it, and whether it fits."""
