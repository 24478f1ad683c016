"""Evaluation by generated answers."""
