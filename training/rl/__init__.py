"""Reinforcement learning from a reward: the formulas, what an iteration knows, and the roles that work it out."""
