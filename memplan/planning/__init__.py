"""Changes that make a run fit, cards to buy, and limits: searches over estimates of runs similar to the given one."""
