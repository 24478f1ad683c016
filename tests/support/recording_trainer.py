"""The trainer of SFT, writing down which samples each step really fed to the engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

from training.roles.language import LanguageTrainer

FOLDER = "MUSTER_TESTS_RECORD"
"""Environment variable that names the folder to write to."""


class RecordingTrainer(LanguageTrainer):
    """One line a step and worker: {"step", "rank", "samples"}."""

    def train(self, done: int, num_steps: int) -> dict:
        answers = [self._recorded(step) for step in range(done, done + num_steps)]
        return {**answers[-1], "rows": [row for answer in answers for row in answer["rows"]]}

    def _recorded(self, done: int) -> dict:
        self.fed: list[int] = []
        answer = super().train(done, 1)
        row = {"step": done + 1, "rank": self.rank_info.rank, "samples": self.fed}
        with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return answer

    def collated(self, store, rows: list[list[int]]) -> dict:
        # What is collated is what is trained on: samples are known by their tokens' place in the store.
        if store is self.store:
            opened, trainer = store, self

            class Watched:
                def __getitem__(self, index: int):
                    trainer.fed.append(index)
                    return opened[index]

            store = Watched()
        return super().collated(store, rows)


class FailingTrainer(LanguageTrainer):
    """Its model raises at the second micro-batch of a step."""

    def setup(self):
        info = super().setup()
        sums = self.engine._sums

        def fail(micro):
            if self.engine.micro_in_hand == 2:
                raise ValueError("index out of range")
            return sums(micro)

        self.engine._sums = fail
        return info

    def second_micro_batch(self) -> list[str]:
        """Where its samples come from, in the first step."""
        return [self.store.where(sample) for row in self._deal(self.store, self.samples_of(1))[1] for sample in row]
