"""What runs inside a worker: recipes, engines, data, checkpoints."""

__version__ = "0.2.0"
