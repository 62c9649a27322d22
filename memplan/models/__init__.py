"""Models: cards, the Hugging Face Hub and its cache, checkpoint headers, and the defaults of config classes."""
