"""The checkpoints of one phase of a run: staged, committed, found, kept, deleted.
One process commits; workers write shards.

In a folder an attempt stages inside a folder of its own, `.attempt-2`, and a commit is the renaming of what is staged.
A later attempt takes that folder away before it looks for checkpoints: from then on nothing of the older one can be
committed, and what it has committed is seen.

In a bucket nothing can be renamed: the shards of attempt 2 are under `step-.../attempt-2/`, and the manifest, written
last, makes a checkpoint of them. Whoever finds a later attempt's claim does not write it.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from training.checkpoint.format import MANIFEST, METRICS, OPTIMIZER, CheckpointError, Manifest, missing, verify
from training.errors import StorageError, Superseded
from training.storage import Local, StoragePath, flush_folder

_STEP, _ATTEMPT, _DOOMED, _ASIDE = "step-", ".attempt-", ".old-", "aside-"
CLAIMS = ".attempts"
"""Of attempts at what is kept in a bucket."""

Counts = Callable[[int], bool]


def step_of(folder: StoragePath) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix(_STEP))


def _name(step: int) -> str:
    return f"{_STEP}{step:08d}"


class Checkpoints:
    """The checkpoints of a phase, to look at. `opened` makes them ready to be written."""

    def __init__(self, root: StoragePath):
        self.root = root

    def folders(self) -> list[StoragePath]:
        """Committed checkpoints, oldest first. In a bucket shards without a manifest are those of
        an unfinished save."""
        folders = [self.root / name for name in sorted(self._steps())]
        return folders if isinstance(self.root, Local) else [f for f in folders if MANIFEST in f.children()]

    def _steps(self) -> list[str]:
        return [name for name, size in self.root.children().items() if name.startswith(_STEP) and size is None]

    def at(self, step: int) -> StoragePath:
        """The checkpoint of a step. Raises CheckpointError that lists those that exist."""
        folders = {step_of(folder): folder for folder in self.folders()}
        if step not in folders:
            there = ", ".join(map(str, folders)) or "none"
            raise CheckpointError(f"{self.root}: no checkpoint of step {step}; there are: {there}")
        return folders[step]

    def resumable(self) -> list[StoragePath]:
        """Those with the optimizer's state, oldest first. One that cannot be read is among them:
        whoever resumes from it is told why."""
        return [folder for folder in self.folders() if not _is_weights_only(folder)]

    def newest_whole(self) -> tuple[StoragePath | None, list[str]]:
        """The newest checkpoint whose every byte is as written, and what was wrong with newer ones."""
        findings: list[str] = []
        for folder in reversed(self.folders()):
            wrong = verify(folder)
            if not wrong:
                return folder, findings
            findings += wrong
        return None, findings

    def best(
        self, metric: str, *, smaller_is_better: bool = True, counts: Counts = lambda step: True
    ) -> StoragePath | None:
        """The checkpoint that counts with the best value of an evaluation metric; the earliest of equals."""
        scored = []
        for folder in self.folders():
            with suppress(CheckpointError):
                value = Manifest.read(folder).metrics.get(metric)
                if value is not None and counts(step_of(folder)):
                    scored.append((value if smaller_is_better else -value, folder.name, folder))
        return min(scored)[2] if scored else None


class OpenCheckpoints(Checkpoints, ABC):
    """The checkpoints of a phase while attempt number `attempt` works on it. Older attempts cannot commit any more."""

    def __init__(self, root: StoragePath, attempt: int):
        """Raises Superseded if a later attempt has opened them, or another process this same one."""
        super().__init__(root)
        self.attempt = attempt

    @property
    @abstractmethod
    def staging(self) -> StoragePath:
        """A folder that every worker must be able to write to."""

    @abstractmethod
    def stage(self, step: int) -> StoragePath:
        """An empty folder to write the shards of a step into;
        not a checkpoint until it is committed. Raises Superseded."""

    @abstractmethod
    def commit(self, staged: StoragePath, manifest: Manifest) -> StoragePath:
        """Make a checkpoint of a staged folder, in one atomic step. Replaces an older one of the same step.

        The names of `manifest.files` are relative to the staged folder. Raises Superseded, and CheckpointError if a
        shard is not there: written by a machine that does not share this folder.
        """

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write down what the checkpoint of a step was evaluated as. Raises Superseded."""
        self._rewrite(self.root / _name(step) / METRICS, json.dumps(dict(metrics), indent=1).encode())

    @abstractmethod
    def set_aside(self, folder: StoragePath) -> None:
        """Take a checkpoint out of the count, without deleting it."""

    def retain(
        self,
        keep: int,
        best: StoragePath | None = None,
        *,
        keep_weights: int = 0,
        counts: Counts = lambda step: True,
    ) -> list[StoragePath]:
        """Delete all but the newest, the newest `keep` of those that count, and the best; returns what was deleted.

        `keep_weights` more of those that count keep their weights alone;
        if it is not 0, so does the best when it is older.

        `counts(step)` is false for a checkpoint that was made because of an interruption alone: what remains must not
        depend on those. As long as the newest is not whole nothing is deleted.
        """
        folders = self.folders()
        if not folders or verify(folders[-1], deep=False):
            return []
        counted = [folder for folder in folders if counts(step_of(folder))]
        whole = {folders[-1], *counted[-keep:]}
        older = {*counted[:-keep][-keep_weights:], best} - whole if keep_weights else set()
        gone = [folder for folder in folders if folder not in whole | older and folder != best]
        for folder in gone:
            delete(folder)
        for folder in folders:
            if folder in older:
                self.drop_optimizer(folder)
        return gone

    def drop_optimizer(self, folder: StoragePath) -> None:
        """Keep the weights of a checkpoint alone. Cut short, it is as it was,
        or has its weights alone. Raises Superseded.

        Does nothing to one of an older version, whose shards hold both, or that cannot be read.
        """
        with suppress(CheckpointError):
            if (light := Manifest.read(folder).without_optimizer()) is not None:
                self._rewrite(folder / MANIFEST, light.dumped())
                _sweep_optimizer(folder)

    @abstractmethod
    def _rewrite(self, path: StoragePath, data: bytes) -> None:
        """Replace a small file of a checkpoint. Raises Superseded."""

    def close(self) -> None:
        """This attempt writes no more."""


def delete(folder: StoragePath) -> None:
    """Delete a checkpoint, of this phase or another. Cut short, it leaves none with holes: in a folder it loses its
    name first, in a bucket its manifest."""
    if not isinstance(folder, Local):
        (folder / MANIFEST).remove()
        return folder.remove()
    doomed = Local(folder.path.with_name(f"{_DOOMED}{folder.name}"))
    doomed.remove()
    folder.path.rename(doomed.path)
    with suppress(OSError):  # what is left goes when the next attempt opens
        doomed.remove()


def _is_weights_only(folder: StoragePath) -> bool:
    try:
        return Manifest.read(folder).weights_only
    except CheckpointError:
        return False


def _sweep_optimizer(folder: StoragePath) -> None:
    """Delete the optimizer's shards of a checkpoint that has its weights alone, if it does."""
    with suppress(CheckpointError):
        manifest = Manifest.read(folder)
        for prefix in {file.name.rpartition("/")[0] for file in manifest.files} if manifest.weights_only else ():
            inside = folder / prefix if prefix else folder
            for name in inside.children():
                if name.endswith(OPTIMIZER):
                    (inside / name).remove()


def refuse_newer(folder: StoragePath, attempt: int) -> None:
    """Raises Superseded if a checkpoint was committed by a later attempt."""
    with suppress(CheckpointError):
        if (newer := Manifest.read(folder).attempt) > attempt:
            raise Superseded(f"{folder}: attempt {newer} has committed this step; this is attempt {attempt}")


def opened(root: StoragePath, attempt: int) -> OpenCheckpoints:
    """The checkpoints at `root`, for attempt number `attempt` to work on. Raises Superseded."""
    return _InFolder(root, attempt) if isinstance(root, Local) else _InBucket(root, attempt)


class _InFolder(OpenCheckpoints):
    def __init__(self, root: Local, attempt: int):
        super().__init__(root, attempt)
        self.root: Local = root
        root.path.mkdir(parents=True, exist_ok=True)
        self.own = root / f"{_ATTEMPT}{attempt}"
        self._refuse_if_superseded()
        try:
            self.own.path.mkdir()
        except FileExistsError:
            raise Superseded(f"{root}: attempt {attempt} is being worked on by another process") from None
        for name in root.children():
            if name.startswith(_ATTEMPT) and name != self.own.name:
                delete(root / name)
            elif name.startswith(_DOOMED):
                with suppress(OSError):
                    (root / name).remove()
        for folder in self.folders():
            _sweep_optimizer(folder)

    @property
    def staging(self) -> Local:
        return self.own

    def _refuse_if_superseded(self) -> None:
        attempts = [int(name.removeprefix(_ATTEMPT)) for name in self.root.children() if name.startswith(_ATTEMPT)]
        if later := [attempt for attempt in attempts if attempt > self.attempt]:
            raise Superseded(f"{self.root}: attempt {max(later)} has taken over; this is attempt {self.attempt}")

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """In the block a folder that is not there means that a later attempt has taken it away,
        unless the storage itself is away."""
        self._refuse_if_superseded()
        try:
            yield
        except FileNotFoundError:
            if self.own.path.exists():
                raise
            if not self.root.path.exists():
                raise StorageError(f"{self.root} is not there: is its storage mounted?") from None
            raise Superseded(f"{self.root}: a later attempt has taken over; this is attempt {self.attempt}") from None

    def stage(self, step: int) -> Local:
        staged = self.own / _name(step)
        with self._ours():
            staged.remove()
            staged.path.mkdir()
        return staged

    def commit(self, staged: StoragePath, manifest: Manifest) -> Local:
        assert isinstance(staged, Local)
        with self._ours():
            if wrong := missing(staged, manifest):
                raise CheckpointError(f"{wrong[0]}; `storage` must be a folder that all machines share, or a bucket")
            (staged / MANIFEST).write(manifest.dumped())
            final = self.root / _name(manifest.step)
            if final.path.exists():
                refuse_newer(final, self.attempt)
                delete(final)
            staged.path.rename(final.path)
        flush_folder(self.root.path)
        return final

    def _rewrite(self, path: StoragePath, data: bytes) -> None:
        with self._ours():
            path.write(data)

    def set_aside(self, folder: StoragePath) -> None:
        assert isinstance(folder, Local)
        target = self.root / f"{_ASIDE}{folder.name}.attempt-{self.attempt}"
        target.remove()
        folder.path.rename(target.path)

    def close(self) -> None:
        with suppress(OSError):
            self.own.remove()


class _InBucket(OpenCheckpoints):
    def __init__(self, root: StoragePath, attempt: int):
        super().__init__(root, attempt)
        self.claim = Claim(root / CLAIMS, attempt)
        self._staged: StoragePath | None = None
        for name in self._steps():
            self._sweep(root / name)
            _sweep_optimizer(root / name)

    @property
    def staging(self) -> StoragePath:
        return self.root

    def _sweep(self, folder: StoragePath) -> None:
        """Remove shards that interrupted saves left behind."""
        inside = folder.children()
        used: set[str] = set()
        if MANIFEST in inside:
            try:
                used = {file.name.partition("/")[0] for file in Manifest.read(folder).files}
            except CheckpointError:
                return  # to be told and set aside when someone looks for the newest
        if any(name.startswith(_ASIDE) for name in inside):
            return
        for name, size in inside.items():
            if size is None and name not in used:
                (folder / name).remove()

    def stage(self, step: int) -> StoragePath:
        self.claim.check()
        staged = self.root / _name(step) / f"attempt-{self.attempt}"
        for leftover in {
            staged,
            self._staged or staged,
        }:  # of a save that failed, perhaps because nothing could be reached
            leftover.remove()
        self._staged = staged
        return staged

    def commit(self, staged: StoragePath, manifest: Manifest) -> StoragePath:
        final = self.root / _name(manifest.step)
        whole = manifest.below(staged.name)
        self.claim.check()  # its sweep may have taken our shards
        if wrong := missing(final, whole):
            raise CheckpointError("\n".join(wrong))
        self.claim.check()
        (final / METRICS).remove()  # of one that was set aside
        path = final / MANIFEST
        if not path.create(whole.dumped()):
            refuse_newer(final, self.attempt)
            path.write(whole.dumped())
        self._staged = None
        return final

    def _rewrite(self, path: StoragePath, data: bytes) -> None:
        self.claim.check()
        path.write(data)

    def set_aside(self, folder: StoragePath) -> None:
        data = (folder / MANIFEST).read()
        (folder / f"{_ASIDE}attempt-{self.attempt}.json").write(data)
        (folder / MANIFEST).remove()


class Claim:
    """One attempt's claim on what it writes in a bucket; a later attempt's claim ends it."""

    def __init__(self, claims: StoragePath, attempt: int):
        """Raises Superseded if a later attempt is there, or another process has claimed this one."""
        self.claims = claims
        self.attempt = attempt
        self.check()
        if not (claims / f"{attempt:05d}").create(uuid.uuid4().hex.encode()):
            raise Superseded(f"{claims}: attempt {attempt} is being worked on by another process")

    def check(self) -> None:
        """Raises Superseded if a later attempt has claimed."""
        if (newest := newest_claim(self.claims)) > self.attempt:
            raise Superseded(f"{self.claims}: attempt {newest} has taken over; this is attempt {self.attempt}")


def newest_claim(claims: StoragePath) -> int:
    """The latest attempt that has claimed, 0 if none has."""
    return max(map(int, claims.children()), default=0)
