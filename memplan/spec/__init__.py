"""The run a user describes, `RunSpec`, and its parts."""
