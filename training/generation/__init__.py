"""Token sequences continued by a model."""
