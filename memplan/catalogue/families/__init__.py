"""One module per family of models, each building the stack of operations that the family's classes run."""
