"""What a decided run does: its graph, sharding, passes, stored weights and pools."""
