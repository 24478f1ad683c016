"""`muster save`: requests a checkpoint from the driver of a run and waits until it is committed. The run continues.

The request is a small file in the run's folder, which the driver looks for between two calls; in a bucket the mirror
fetches it. The result is recorded in events.jsonl.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from launcher.runfolder.bucket_sync import SAVE
from launcher.runfolder.run_folder import ENDINGS, EVENTS, RunFolder
from training.errors import InputError, StorageError, TrainingError

_LOOK_S, _LOOK_IN_BUCKET_S = 0.2, 2.0
_LONGEST_ID = 64
"""Bytes. The length is limited since anyone who can write to the folder can write the file."""
_NO_STEPS = ("started", "incident", "moved", "phase_started", "phase_finished")
"""Events after which no step is trained until the event `training`."""
_ENDS = (*ENDINGS, "phase_finished")

Event = Mapping[str, Any]


def take(run: RunFolder) -> str | None:
    """Take a request, in the driver; returns its id, None if there is none."""
    path = run.folder / SAVE
    if not os.path.exists(path):
        return None
    try:
        identity = path.read_bytes()[:_LONGEST_ID].decode(errors="replace")
        path.unlink()
    except OSError:  # the storage is away for a moment
        return None
    return identity


def request(run: RunFolder, *, is_running: bool = False) -> dict[str, Any]:
    """Request a checkpoint; returns its phase, step and address, or those of one that already has all steps.

    `is_running`: the run is known to be running, though this machine may not see its lock. Raises InputError if there
    is nothing to save, TrainingError if the run ends before it has saved.
    """
    before = _events(run)
    if not is_running and (state := run.state()) != "running":
        raise InputError.of(run.address, f"is not running (it is {state}); {_newest(before)}")
    phase, total = _trained(before)
    if phase is None:
        raise InputError.of(
            run.address,
            f"trains no step at the moment: it prepares data, workers or a model; {_newest(before)}, and there is "
            "nothing newer to save",
        )
    if (last := next(_checkpoints(before, phase, total), None)) is not None:
        return _answer(last)
    identity = secrets.token_hex(8)
    path = run.root / SAVE
    path.write(identity.encode())
    try:
        return _wait(run, identity, len(before), watch=run.state() == "running")
    finally:
        with suppress(OSError, StorageError):
            if path.read() == identity.encode():
                path.remove()


def _wait(run: RunFolder, identity: str, first: int, *, watch: bool) -> dict[str, Any]:
    """`first`: where the events after the request begin; `watch`: whether it can be seen that the driver is gone."""
    while True:
        is_lost = watch and run.state() == "lost"
        events = _events(run)
        if (answer := _answered(run, events, identity)) is not None:
            return answer
        after = events[first:]
        if is_lost or any(event["event"] in _ENDS for event in after):
            saved = [event for event in after if event["event"] == "checkpoint"]
            if saved:
                return _answer(saved[-1])
            how = "its process is gone" if is_lost else "it has ended"
            raise TrainingError(f"{run.address}: saving failed: {how}; {_newest(events)}")
        time.sleep(_LOOK_IN_BUCKET_S if run.remote else _LOOK_S)


def _events(run: RunFolder) -> list[dict[str, Any]]:
    if run.remote is not None:
        (run.folder / EVENTS).write_bytes((run.remote / EVENTS).read())
    return run.events()


def _trained(events: Sequence[Event]) -> tuple[str | None, int]:
    """Return the phase that trains steps at the moment, None if there is none, and its last step."""
    last = next((e for e in reversed(events) if e["event"] in (*_NO_STEPS, "training")), None)
    if last is None or last["event"] != "training":
        return None, 0
    return last["phase"], last["total_steps"]


def _checkpoints(events: Sequence[Event], phase: str, step: int) -> Iterator[Event]:
    """Return checkpoints of this step or later, saved or restored in the current attempt, the oldest first."""
    attempt = events[-1]["attempt"]
    mine = (event for event in events if event.get("phase") == phase and event["attempt"] == attempt)
    return (event for event in mine if event["event"] in ("checkpoint", "restored") and event["step"] >= step)


def _answered(run: RunFolder, events: Sequence[Event], identity: str) -> dict[str, Any] | None:
    taken = next((e for e in events if e["event"] == "save_requested" and e["id"] == identity), None)
    if taken is None:
        return None
    if taken["step"] == 0:
        raise InputError.of(run.address, "has not trained a step yet; there is nothing to save")
    found = next(_checkpoints(events, taken["phase"], taken["step"]), None)
    return None if found is None else _answer(found)


def _answer(event: Event) -> dict[str, Any]:
    return {name: event[name] for name in ("phase", "step", "checkpoint")}


def _newest(events: Sequence[Event]) -> str:
    saved = next((e for e in reversed(events) if e["event"] in ("checkpoint", "restored")), None)
    return (
        f"its newest checkpoint is of step {saved['step']} of {saved['phase']}" if saved else "it has no checkpoint yet"
    )


def lines(answer: Mapping[str, Any]) -> Iterator[str]:
    yield f"{answer['phase']}: saved step {answer['step']} in {answer['checkpoint']}; the run continues"
