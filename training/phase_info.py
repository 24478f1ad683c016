"""Figures of a phase that are known once its data and model are loaded. Free of torch: the driver process reads
them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PhaseInfo:
    """The answer of a trainer's set-up."""

    total_steps: int
    total_samples: int
    """That the phase trains on in all."""
    num_samples: int
    """In an epoch."""
    num_eval_samples: int
    mean_tokens: float = 0.0
    """Of a sample."""
    num_parameters: int
    """That are trained."""
    dtype: str
    attention: str
    kernels: str = "torch"
    recomputes: bool = False
    """Activations, in the backward pass."""
    device: str
    data_hash: str
    data_hash_before: str = ""
    """What `data_hash` was in versions that read these rows differently."""
    data_changes: tuple[str, ...] = ()
    """Names in `formats.CHANGES`: what has changed in how these rows are read."""
    chats: bool
    """Whether the training data are conversations, so that a question is a user's turn."""
    stop_tokens: tuple[int, ...] = ()
    """Of PPO: the tokens that end a response."""
    stop_tokens_before: tuple[int, ...] = ()
    """The same in versions that did not look for the end of a turn."""
    data_damage: tuple[str, ...] = ()
    """What was wrong with tokenized data that this worker has made anew."""
    notes: list[str]
    """What the user should be told."""
