"""The process that drives a run: phases in order, and what follows a failure."""
