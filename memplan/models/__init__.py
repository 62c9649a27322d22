"""Models: cards, the Hub's cache, checkpoint headers, and what config classes fill in."""
