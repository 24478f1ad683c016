"""The engine that trains: one step over a global batch."""
