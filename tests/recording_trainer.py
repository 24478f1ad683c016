"""The trainer of SFT, writing down which samples each step really fed to the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.recipes.sft import SFTTrainer

FOLDER = "MUSTER_TESTS_RECORD"
"""Environment variable that names the folder to write to."""


class RecordingTrainer(SFTTrainer):
    """One line a step and worker: {"step", "rank", "samples"}."""

    def train(self, done: int, num_steps: int) -> dict:
        answers = [self._recorded(step) for step in range(done, done + num_steps)]
        return {**answers[-1], "rows": [row for answer in answers for row in answer["rows"]]}

    def _recorded(self, done: int) -> dict:
        self.fed: list[int] = []
        answer = super().train(done, 1)
        row = {"step": done + 1, "rank": self.seat.rank, "samples": self.fed}
        with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return answer

    def _hand(self, store, samples: np.ndarray) -> Iterator[dict]:
        # What is collated is what is trained on: samples are known by their tokens' place in the store.
        if store is self.store:
            opened, trainer = store, self

            class Watched:
                lengths_of = staticmethod(opened.lengths_of)

                def __getitem__(self, index: int):
                    trainer.fed.append(index)
                    return opened[index]

            store = Watched()
        yield from super()._hand(store, samples)
