"""Where metrics go beside metrics.jsonl: TensorBoard, W&B, MLflow. One class each;
the packages are loaded when asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from training.errors import InputError, Problem


class Tracker(Protocol):
    """Takes the numbers of one step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the phase's own folder."""

    def __init__(self, run: str, phase: str, folder: Path, settings: Mapping[str, Any]):
        from tensorboard.summary import Writer

        self.writer = Writer(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _identity(folder: Path) -> str:
    """A random name of this phase of this run, so that a service goes on with it and never
    with another of the same name."""
    note = folder / ".tracker-id"
    if not note.exists():
        note.write_text(uuid.uuid4().hex)
    return note.read_text()


class WandB:
    """One W&B run a phase; goes on in the same one after a resume.
    Key and mode come from W&B's own environment variables."""

    def __init__(self, run: str, phase: str, folder: Path, settings: Mapping[str, Any]):
        import wandb

        self.run = wandb.init(
            project="muster", group=run, name=f"{run}/{phase}", id=_identity(folder), resume="allow",
            dir=folder, config=dict(settings),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """One MLflow run a phase, in the tracking server that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: str, phase: str, folder: Path, settings: Mapping[str, Any]):
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(run)
        identity = _identity(folder)
        earlier = mlflow.search_runs(filter_string=f"tags.muster_id = '{identity}'", output_format="list")
        mlflow.start_run(run_id=earlier[0].info.run_id if earlier else None, run_name=None if earlier else phase)
        if not earlier:
            mlflow.set_tag("muster_id", identity)
            mlflow.log_params({name: str(value)[:500] for name, value in settings.items()})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Callable[[str, str, Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check(names: Sequence[str], where: str = "job") -> None:
    """Raises InputError for trackers whose package is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            [
                Problem(where, "track", f"{name} is not installed: pip install 'muster-train[{name}]'")
                for name in missing
            ]
        )


def open_all(
    names: Sequence[str], run: str, phase: str, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]
) -> list[Tracker]:
    """The trackers of one phase. Raises InputError for one that cannot be set up."""
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(_Careful(name, TRACKERS[name](run, phase, folder, settings), say))
        except Exception as error:  # a service's own: no key, no server, no such store
            for tracker in opened:
                tracker.close()
            raise InputError.of(name, f"cannot be set up: {error}", "track") from error
    return opened


class _Careful:
    """A tracker that cannot stop the training: when its service fails it is told once, and left."""

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], None]):
        self.name, self.tracker, self.say = name, tracker, say
        self.works = True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(lambda: self.tracker.log(step, values))

    def close(self) -> None:
        self._attempt(self.tracker.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            action()
        except Exception as error:
            self.works = False
            self.say(f"{self.name} failed and gets no more metrics ({error}); metrics.jsonl has them all")
