"""The interpreter of `memplan.core.ir`: who is alive when, and how much that is. It knows no model and no method."""
