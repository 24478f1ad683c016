"""The trainer of SFT with logits of a few places at a time, as if the vocabulary were large."""

from __future__ import annotations

from training.models import chunked_logits
from training.roles.language import LanguageTrainer

LOGITS_AT_ONCE = 4096


class ChunkedTrainer(LanguageTrainer):
    """Its workers have other numbers of places in a micro-batch, and so of chunks."""

    def setup(self):
        chunked_logits.LOGITS_AT_ONCE = LOGITS_AT_ONCE
        return super().setup()
