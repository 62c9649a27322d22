"""One module per family of models: the stack of operations that its classes run."""
