"""The trainer of SFT, telling what its memory hangs on: what restoring takes, which layers recompute;
and how often they are compiled."""

from tests.support.roles import Peak
from training.roles.language import LanguageTrainer


class MeasuredTrainer(LanguageTrainer):
    def restore_measured(self, checkpoint: str) -> int:
        """Bytes by which this process's own memory grew at most."""
        with Peak() as peak:
            assert self.restore(checkpoint) is None
        return peak.bytes

    def layers_that_recompute(self) -> list[bool]:
        return [layer.gradient_checkpointing for layer in self.engine.ds.module.lm.get_decoder().layers]

    def compilations(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]
