"""The trainer of SFT, watching the memory that restoring takes."""

from tests.roles import Peak
from training.recipes.language import LanguageTrainer


class MeasuredTrainer(LanguageTrainer):
    def restore_measured(self, checkpoint: str) -> int:
        """Bytes by which this process's own memory grew at most."""
        with Peak() as peak:
            assert self.restore(checkpoint) is None
        return peak.bytes
