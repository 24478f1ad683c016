"""Jobs through Slurm: the same operations as on a Ray cluster, with sbatch, squeue and scancel."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.providers.slurm import SlurmProvider


class SlurmSession:
    """Runs a Slurm command for each call; no connection stays open."""

    def __init__(self, provider: SlurmProvider):
        self.provider = provider

    def submit(
        self, name: str, packed: Path, info: Mapping[str, str], workers: int, environment: Mapping[str, str],
        words: Sequence[str]
    ) -> None:  # fmt: skip
        self.provider.submit(name, packed.read_bytes(), info, workers=workers, environment=environment, words=words)

    def jobs(self) -> list[dict[str, Any]]:
        return self.provider.jobs()

    def stream(self, name: str, seen: int) -> Iterator[str]:
        if text := self.rest(name, seen):
            yield text

    def rest(self, name: str, seen: int) -> str:
        # `seen` counts characters; a character may be several bytes, and the last one may not be whole yet.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(self.provider.output(name, 0))
        return text[seen:]

    def save(self, name: str, run: str) -> str:
        return self.provider.save(name, run)

    def stop(self, name: str) -> None:
        self.provider.stop(name)
