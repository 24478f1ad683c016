"""Checkpoints: their format, those of a phase, how they are written, what they are exported to."""
