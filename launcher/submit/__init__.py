"""Jobs on a cluster: packed, submitted, followed, stopped."""
