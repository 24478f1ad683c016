"""Reinforcement learning from a reward: the formulas. Pure functions of tensors; no model, no file, no worker."""
