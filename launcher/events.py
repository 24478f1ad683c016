"""What stands in events.jsonl: the one table of kinds of events and of what each says.

The reference page is generated from it, and a test fails for an event in the code that is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One kind of event."""

    meaning: str
    facts: dict[str, str] = field(default_factory=dict)
    """What it says beside COMMON and, of a phase, OF_A_PHASE."""
    of_phase: bool = True


COMMON = {
    "time": "When, in UTC, to the millisecond.",
    "attempt": "Which start of the run, counted from 1.",
    "event": "What has happened: the names below.",
}
OF_A_PHASE = {"phase": "Name of the phase."}

EVENTS: dict[str, Event] = {
    "started": Event(
        "An attempt begins.",
        {
            "host": "Machine of the process that drives the run.",
            "pid": "Its process id.",
            "by_itself": "true if the run goes on after a failure or a move, without a person.",
            "versions": "Of Python and the packages that the result may hang on, where a person started it.",
        },
        of_phase=False,
    ),
    "changes_accepted": Event(
        "A person goes on though the job is another one (`--accept-changes`).",
        {"changes": "Settings that differ, each `key: old -> new`."},
        of_phase=False,
    ),
    "rewound": Event(
        "A person takes the run back (`--step`).", {"to": "Step by phase; 0 is its beginning."}, of_phase=False
    ),
    "revisions": Event(
        "Branches, tags and default branches of the Hugging Face hub were looked up; the run uses these commits from now on.",
        {"commits": "By what the job names, such as `model owner/name` or `dataset owner/name@v1`."},
        of_phase=False,
    ),
    "phase_started": Event("A phase is taken up, from its beginning or its newest checkpoint."),
    "data_damaged": Event(
        "Tokenized data in a machine's cache were not as they were written and were made anew.",
        {
            "finding": "Which file, and what is wrong with it.",
            "rank": "The worker that found it; null: it was found when the run was prepared.",
        },
    ),
    "workers": Event(
        "The workers of an attempt are there.",
        {"workers": "Of each its rank, the address of its machine, and its process id there."},
    ),
    "retention_failed": Event(
        "Checkpoints that need not stay could not be deleted, or their optimizer's state; tried again after the next checkpoint.",
        {"error": "Why."},
    ),
    "quota_exceeded": Event(
        "The checkpoints that must stay and the next one take more than `checkpoint_quota`; the run goes on saving. Written once.",
        {"quota": "The setting.", "bytes": "How many bytes are too many."},
    ),
    "save_requested": Event(
        "Somebody has asked for a checkpoint now (`muster save`).",
        {"step": "Steps that are done; they will be in the checkpoint.", "id": "Of the request."},
    ),
    "preflight": Event(
        "The machines were looked at before the first step.",
        {
            "seconds": "How long that took.",
            "findings": "How many things were found that are not well; each is a warning.",
            "tflops": "Of a matrix product, 10^12 operations a second: least and median of the workers.",
            "storage_mb_s": "Writing to storage and reading back, MB a second: least and median.",
            "sent_mb_s": "To the next worker, MB a second: least and median; not with one worker.",
            "groups": "With several groups of workers all of this for each of them, in place of it.",
        },
    ),
    "training": Event(
        "The model is loaded, training begins.",
        {
            "step": "Steps that are done already.",
            "redone_s": "Seconds of steps behind that, which are lost and done again.",
            "total_steps": "Steps of the phase.",
            "parameters": "How many numbers are trained.",
            "samples": "Samples of an epoch.",
            "dtype": "Type of the computation.",
            "device": "cpu or cuda.",
            "attention": "Attention kernel.",
            "kernels": "Of norms, rotations and gated layers: torch or liger.",
            "recomputes": "true if activations are recomputed in the backward pass (`model.gradient_checkpointing`).",
            "notes": "What the user was told of data and settings.",
        },
    ),
    "planned": Event(
        "What the plan expects of the phase; `muster status` holds it against what comes.",
        {
            "workers": "For so many workers.",
            "step_s": "Seconds of a step.",
            "range": "Its least and most, in seconds.",
            "hours": "Of all steps.",
            "memory_gib": "GiB of a worker.",
            "price": "Of the machines, an hour; null if they have none.",
        },
    ),
    "restored": Event(
        "The phase goes on from a checkpoint.",
        {"step": "Its step.", "checkpoint": "Its folder.", "seconds": "How long reading it took."},
    ),
    "checkpoint": Event(
        "A checkpoint is whole.",
        {
            "step": "Its step.",
            "checkpoint": "Its folder.",
            "seconds": "From the copy in memory until it was whole.",
            "stall_s": "Seconds for which training waited.",
        },
    ),
    "save_failed": Event(
        "A checkpoint could not be written; it is tried once more.", {"step": "Its step.", "error": "Why."}
    ),
    "checkpoint_damaged": Event(
        "A checkpoint was found damaged and is passed over.", {"finding": "Which file, and what is wrong with it."}
    ),
    "checkpoint_set_aside": Event(
        "A checkpoint behind the step that the run goes on from is moved away, not deleted.", {"step": "Its step."}
    ),
    "profiled": Event(
        "The steps of `profile` are done, and where their time went is written down.",
        {
            "steps": "The first and the last.",
            "worker": "Whose they are: the first worker of a group, named by the group's first role.",
            "summary": "The largest shares of the time.",
            "table": "File of the table.",
            "trace": "File of the trace, for chrome://tracing or Perfetto.",
        },
    ),
    "profile_failed": Event(
        "Steps could not be profiled, which stops nothing.", {"steps": "The first and the last.", "error": "Why."}
    ),
    "warning": Event("Something that a person should know, and that stops nothing.", {"what": "It, in words."}),
    "output_failed": Event(
        "What the run prints cannot be read by anybody; it goes on without.",
        {"stream": "stdout or stderr.", "error": "Why: a closed terminal, a pipe without a reader, a full disk."},
        of_phase=False,
    ),
    "incident": Event(
        "Something failed; docs/failures.md says what is done about each class.",
        {
            "class": "What kind of failure it is.",
            "message": "What was seen, in a line.",
            "step": "The step in hand.",
            "checkpoint": "Step of the newest checkpoint at that time; 0 if there was none.",
            "rank": "The worker that failed first; null if it was none.",
            "node": "Its machine.",
            "retry": "Whether the run goes on by itself.",
            "why": "Why, or why not.",
            "skip": "A step whose batch is not learnt from after this; null: none.",
        },
    ),
    "moved": Event("Saved, to go on with other machines.", {"why": "Why."}),
    "limit_reached": Event("Saved and stopped at `max_hours` or `max_cost`.", {"what": "Which, and how much it was."}),
    "reached": Event(
        "PPO ends before its last iteration (`stop`).", {"step": "The last iteration.", "what": "What was reached."}
    ),
    "phase_finished": Event(
        "A phase is done.",
        {
            "checkpoint": "The one that it ends with: the last, or the best if the job asks for it.",
            "model": "Its folder.",
        },
    ),
    "interrupted": Event(
        "The run was stopped, or only some of its phases were asked for.",
        {"orderly": "false: stopped at once, without a checkpoint."},
        of_phase=False,
    ),
    "failed": Event("The run is given up until a person resumes it.", {"error": "Why."}, of_phase=False),
    "done": Event("All phases are done.", of_phase=False),
}
"""In the order in which a run meets them."""
