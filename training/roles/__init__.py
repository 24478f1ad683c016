"""What runs in workers: the roles of single-role recipes."""
