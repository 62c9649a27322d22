"""Vision towers, and the parts of a vision-language model that a text-only step leaves alone."""
