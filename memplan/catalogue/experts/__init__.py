"""Mixtures of experts: routers, grouped products, loops over experts, and experts while decoding."""
