"""Vision towers, and the towers that a text-only step does not run."""
