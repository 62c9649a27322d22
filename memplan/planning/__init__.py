"""What to change, what to buy, and how far it goes: search over the estimates of runs like the one asked."""
