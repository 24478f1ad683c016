"""The schema of events.jsonl: all kinds of events and their fields.

The reference page is generated from it, and a test fails for an event in the code that is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One kind of event."""

    meaning: str
    fields: dict[str, str] = field(default_factory=dict)
    """Its fields in addition to COMMON and, for events of a phase, OF_A_PHASE."""
    of_phase: bool = True


COMMON = {
    "time": "Time of the event, in UTC, to the millisecond.",
    "attempt": "Number of the attempt, counted from 1.",
    "event": "Kind of event: one of the names below.",
}
OF_A_PHASE = {"phase": "Name of the phase."}

EVENTS: dict[str, Event] = {
    "started": Event(
        "An attempt begins.",
        {
            "host": "Machine of the driver.",
            "pid": "Process id of the driver.",
            "by_itself": "true if the run restarted automatically after a failure or a move.",
            "versions": "Versions of Python and of packages that can affect the result; only if a user began it.",
        },
        of_phase=False,
    ),
    "changes_accepted": Event(
        "A user resumed the run with a changed job (`--accept-changes`).",
        {"changes": "The settings that differ, each as `key: old -> new`."},
        of_phase=False,
    ),
    "rewound": Event(
        "A user rewound the run to an earlier step (`--step`).",
        {"to": "Step of each phase; 0 is its beginning."},
        of_phase=False,
    ),
    "revisions": Event(
        "Branches, tags and default branches of the Hugging Face hub were resolved. The run uses these commits from "
        "now on.",
        {"commits": "Commits by the names in the job, such as `model owner/name` or `dataset owner/name@v1`."},
        of_phase=False,
    ),
    "phase_started": Event("A phase begins, or continues from its newest checkpoint."),
    "data_damaged": Event(
        "Tokenized data in the cache of a machine differed from what was written there, and were prepared again.",
        {
            "finding": "Which file, and what is wrong with it.",
            "rank": "Rank of the worker that found it; null if it was found while the run was prepared.",
        },
    ),
    "workers": Event(
        "The workers of an attempt have started.",
        {"workers": "Rank of each worker, address of its machine, and its process id."},
    ),
    "retention_failed": Event(
        "Checkpoints that are no longer needed, or their optimizer states, could not be deleted. The next checkpoint "
        "triggers another try.",
        {"error": "The reason."},
    ),
    "quota_exceeded": Event(
        "The checkpoints that must be kept and the next one together exceed `checkpoint_quota`. The run continues to "
        "save. Written once.",
        {"quota": "The setting.", "bytes": "Number of bytes above the quota."},
    ),
    "save_requested": Event(
        "A user requested a checkpoint (`muster save`).",
        {"step": "Number of finished steps, which the checkpoint will contain.", "id": "Id of the request."},
    ),
    "preflight": Event(
        "The machines were checked before the first step.",
        {
            "seconds": "Duration of the check.",
            "findings": "Number of problems; each is also a warning.",
            "tflops": "Speed of a matrix product, in 10^12 operations per second: minimum and median of the workers.",
            "storage_mb_s": "Speed of writing to storage and reading back, in MB per second: minimum and median.",
            "sent_mb_s": "Speed of sending to the next worker, in MB per second: minimum and median. Absent with a "
            "single worker.",
            "groups": "With several groups of workers: all of these values for each group.",
        },
    ),
    "training": Event(
        "The model is loaded, and training begins.",
        {
            "step": "Number of finished steps.",
            "redone_s": "Duration of later steps that were lost and are repeated, in seconds.",
            "total_steps": "Number of steps of the phase.",
            "parameters": "Number of trained parameters.",
            "samples": "Number of samples in an epoch.",
            "dtype": "Data type of the computation.",
            "device": "cpu or cuda.",
            "attention": "Attention kernel.",
            "kernels": "Kernels of norms, rotary embeddings and gated layers: torch or liger.",
            "recomputes": "true if activations are recomputed in the backward pass (`model.gradient_checkpointing`).",
            "notes": "Notes about data and settings that were printed.",
        },
    ),
    "planned": Event(
        "The plan of the phase, which `muster status` compares with the measured values.",
        {
            "workers": "Number of workers that the plan assumes.",
            "step_s": "Duration of a step, in seconds.",
            "range": "Its minimum and maximum, in seconds.",
            "hours": "Duration of all steps.",
            "memory_gib": "Memory of a worker, in GiB.",
            "price": "Price of the machines per hour; null if they have no price.",
        },
    ),
    "restored": Event(
        "The phase continues from a checkpoint.",
        {"step": "Step of the checkpoint.", "checkpoint": "Its folder.", "seconds": "Duration of reading it."},
    ),
    "checkpoint": Event(
        "A checkpoint is complete.",
        {
            "step": "Its step.",
            "checkpoint": "Its folder.",
            "seconds": "Time from the copy in memory until the checkpoint was complete.",
            "stall_s": "Seconds during which training waited for it.",
        },
    ),
    "save_failed": Event(
        "A checkpoint could not be written. Saving is retried once.", {"step": "Its step.", "error": "The reason."}
    ),
    "checkpoint_damaged": Event(
        "A damaged checkpoint was found and is not used.", {"finding": "The damaged file and what is wrong with it."}
    ),
    "checkpoint_set_aside": Event(
        "A checkpoint of a later step than the one that the run continues from was moved away, not deleted.",
        {"step": "Its step."},
    ),
    "profiled": Event(
        "The steps of `profile` are finished, and their profile was written.",
        {
            "steps": "The first and the last step.",
            "worker": "The profiled worker: the first one of a group, named by the first role of the group.",
            "summary": "The largest shares of the time.",
            "table": "File of the table.",
            "trace": "File of the trace, for chrome://tracing or Perfetto.",
        },
    ),
    "profile_failed": Event(
        "Steps could not be profiled. Training continues.",
        {"steps": "The first and the last step.", "error": "The reason."},
    ),
    "warning": Event("A problem that the user should know of. The run continues.", {"what": "The warning."}),
    "output_failed": Event(
        "The output of the run can no longer be written. The run continues without it.",
        {
            "stream": "stdout or stderr.",
            "error": "The reason: a closed terminal, a pipe without a reader, a full disk.",
        },
        of_phase=False,
    ),
    "incident": Event(
        "Something failed. docs/failures.md explains each class and what is done about it.",
        {
            "class": "Class of the failure.",
            "message": "What was observed, in one line.",
            "step": "The step during which it happened.",
            "checkpoint": "Step of the newest checkpoint at that time; 0 if there was none.",
            "rank": "The worker that failed first; null if no worker failed.",
            "node": "Machine of that worker.",
            "retry": "Whether the run continues automatically.",
            "why": "The reason for that decision.",
            "skip": "A step whose batch is skipped from now on; null: none.",
        },
    ),
    "moved": Event("The run saved a checkpoint in order to continue on other machines.", {"why": "The reason."}),
    "limit_reached": Event(
        "The run saved a checkpoint and stopped at `max_hours` or `max_cost`.", {"what": "The limit and the value."}
    ),
    "reached": Event(
        "PPO ends before its last iteration (`stop`).",
        {"step": "The last iteration.", "what": "The condition that was met."},
    ),
    "phase_finished": Event(
        "A phase is finished.",
        {
            "checkpoint": "Its final checkpoint: the last one, or the best if the job says so.",
            "model": "Folder of its model.",
        },
    ),
    "interrupted": Event(
        "The run was stopped.", {"orderly": "false: stopped immediately, without a checkpoint."}, of_phase=False
    ),
    "partial": Event(
        "The phases that `--only` chose are finished, and others remain. Versions before 0.2 wrote `interrupted`.",
        {"finished": "Phases that are finished.", "remaining": "Phases that are not."},
        of_phase=False,
    ),
    "failed": Event(
        "The run failed. It stays failed until a user resumes it.", {"error": "The reason."}, of_phase=False
    ),
    "done": Event("All phases are finished.", of_phase=False),
}
"""In the order in which they occur in a run."""
