"""Whether a job file is the job.yaml of a run, where every phase is complete, or one that a user has written."""

from __future__ import annotations

from typing import Any

from launcher.jobfile.yaml_with_lines import Document

RESOLVED = "resolved"
"""The key that marks the job.yaml of a run."""

_OF_EVERY_RESOLVED_PHASE = {
    "recipe", "from", "seed", "model", "data", "epochs", "max_steps", "batch", "micro_tokens", "micro_batch",
    "learning_rate", "schedule", "optimizer", "clip", "checkpoint", "sharding", "resources", "deepspeed",
}  # fmt: skip
"""Keys by which a resolved file of a version without `resolved` is recognised: nobody writes all
of them into every phase."""


def is_resolved(document: Document) -> bool:
    phases = sections_of_phases(document)
    return RESOLVED in document.data or (
        bool(phases) and all(section.keys() >= _OF_EVERY_RESOLVED_PHASE for section in phases.values())
    )


def sections_of_phases(document: Document) -> dict[str, dict[str, Any]]:
    phases = document.data.get("phases")
    sections = phases.items() if isinstance(phases, dict) else ()
    return {name: section for name, section in sections if isinstance(section, dict)}
