"""Ray: which source shards are left, who does them, how they are committed, what is shown meanwhile."""
