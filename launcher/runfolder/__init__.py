"""The folder of a run: its small files, its state, its copy in a bucket."""
