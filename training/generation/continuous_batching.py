"""Continues token sequences by transformers' continuous batching: where a row ends,
the next prompt takes its place at once.

The tokens are those of training/generation/sampling.py, drawn by the same numbers, whatever shares a pass with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from training.data.batching import SDPA_VARLEN
from training.estimate.transformers_compat import attention_in_use
from training.generation.sampling import Continued, Sampling, sample_token, uniform
from training.process import heartbeat

_ON_CPU: dict[str, Any] = {"page_size": 32, "num_blocks": 256, "max_batch_tokens": 1024}
"""On a CPU nothing is known of the memory that is free for the cache."""
_WAIT_S = 1.0
_END_S = 60.0
"""For the thread that generates, to end."""
_BITS = 2.0**32


def generate_all(
    lm: Any, prompts: Sequence[Sequence[int]], keys: Sequence[int], ends: Collection[int], settings: Sampling
) -> list[Continued]:
    """One continuation of every prompt, in their order, up to a token of `ends`. `keys[i]` seeds the i-th.

    `lm` is a causal language model of transformers. Raises RuntimeError.
    """
    if not prompts:
        return []
    with _plain_attention(lm):
        return _continue_all(lm, prompts, keys, ends, settings)


@contextmanager
def _plain_attention(lm: Any) -> Iterator[None]:
    """For the length of a block torch's kernel instead of ours, which knows no pages."""
    ours = attention_in_use(lm) == SDPA_VARLEN
    if ours:
        lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            lm.set_attn_implementation(SDPA_VARLEN)


def _continue_all(
    lm: Any, prompts: Sequence[Sequence[int]], keys: Sequence[int], ends: Collection[int], settings: Sampling
) -> list[Continued]:
    manager = _manager(lm, ends, settings)
    manager.start()
    try:
        for number, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            manager.add_request(list(prompt), str(number), settings.max_new_tokens, key=key)
        texts = _collected(manager, len(prompts))
    finally:
        manager.stop(block=True, timeout=_END_S)
        manager.destroy()
    return [_continued(texts[str(number)], ends) for number in range(len(prompts))]


def _manager(lm: Any, ends: Collection[int], settings: Sampling) -> Any:
    on_cpu = next(lm.parameters()).device.type == "cpu"
    manager = lm.init_continuous_batching(
        # The draw leaves one token: greedy takes it.
        GenerationConfig(do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=sorted(ends) or -1),
        ContinuousBatchingConfig(
            **(_ON_CPU if on_cpu else {}),
            use_async_batching=False,  # it would ask for the numbers of a token before it counts the one before
            auto_switch_to_flash=False,  # it might fetch a kernel from the hub
        ),
    )
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Draw(settings)]))
    manager.logit_processor.tensors_required = 1
    return manager


def _collected(manager: Any, count: int) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {}
    while len(texts) < count:
        output = manager.get_result(timeout=_WAIT_S)
        if output is None:
            if not manager.is_running():
                raise RuntimeError(
                    f"continuous batching stopped with {count - len(texts)} of {count} responses to come"
                )
        elif output.error is not None:
            raise RuntimeError(f"continuous batching failed: {output.error}")
        elif output.is_finished():
            texts[output.request_id] = output.generated_tokens
    return texts


def _continued(tokens: list[int], ends: Collection[int]) -> Continued:
    return Continued(tokens[:-1], tokens[-1]) if tokens[-1] in ends else Continued(tokens, None)


class _Draw(ContinuousBatchingLogitsProcessor):
    """Leaves of every row the token that its key and position draw. The numbers travel as 32 bits."""

    supported_kwargs = {"key": int}  # noqa: RUF012 (declared so by transformers)
    ignored_kwargs = ()

    def __init__(self, settings: Sampling):
        self.settings = settings

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        heartbeat.progressed()
        states = [request.state for request in requests_with_new_token]
        keys = np.array([state.logit_processor_kwargs["key"] for state in states], np.uint64)
        positions = np.array([len(state.generated_tokens) for state in states])
        return torch.from_numpy((uniform(keys, positions) * _BITS).astype(np.uint32).view(np.int32))

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        drawn_B = (tensor_arg[: len(scores)].long() & 0xFFFFFFFF).double() / _BITS
        tokens_B1 = sample_token(scores, drawn_B, self.settings)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens_B1, 0.0)
