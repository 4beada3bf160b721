"""What a run watches while it trains: the group, safety collapse, memory, checkpoints."""
