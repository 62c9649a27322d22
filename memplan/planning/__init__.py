"""What to change, what to buy, and what the limits are: searches over estimates of runs similar to the given one."""
