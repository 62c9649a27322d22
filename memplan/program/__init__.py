"""The graph, sharding, passes, stored weights and cache pools of a resolved run."""
