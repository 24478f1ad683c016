"""The launcher with 1 to 1,024 workers that answer at once: what gathering, a call,
a look at all of them and a checkpoint cost the driver.

Real: Ray, its calls and its placement groups, the driver of the recipe, the watch, the commit of checkpoints. Not real:
the workers, of whom many share a few processes, so that a machine of any size can play 128 machines of 8.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import Options
from training.config import SFT
from training.phase_info import PhaseInfo

SIZES = (1, 8, 64, 256, 1024)
STEP_S = 10.0
TARGET = 0.01
"""Of a step."""
_PROCESSES = 2
_STEPS = 8
_MATES = 8
"""Workers of a machine."""


class FakePlace:
    """A worker's place whose worker has always just done what it is asked."""

    def call(self, role: str, method: str, kwargs: dict[str, Any], *args: Any) -> Any:
        return getattr(self, f"_{method}")(*args)

    def health(self) -> Any:
        from launcher.workers.supervisor import WorkerHealth
        from training.process.heartbeat import Pulse

        return WorkerHealth(Pulse(0.1, 0.1, 1, 1), "R", 0.5, None)

    def _setup(self) -> PhaseInfo:
        return PhaseInfo(
            total_steps=_STEPS, total_samples=_STEPS * 1024, num_samples=10**6, num_eval_samples=0,
            num_parameters=7 * 10**9,
            dtype="bfloat16", attention="sdpa", device="cpu", data_hash="0" * 16, chats=False, notes=[],
        )  # fmt: skip

    def _cannot_save_to(self, address: str) -> None:
        return None

    def _get_ready(self, skipped: frozenset[int] = frozenset()) -> None:
        return None

    def _train(self, done: int, steps: int) -> dict[str, Any]:
        row = {
            "loss": 1.0, "learning_rate": 1e-5, "grad_norm": 1.0, "tokens": 10**6, "target_tokens": 10**6,
            "samples": 1024,
            "step_s": STEP_S, "tokens_per_s": 1e5,
        }  # fmt: skip
        return {
            "rows": [{"step": done + n + 1, **row} for n in range(steps)],
            "memory_gib": 60.0,
            "gpu_full": 0.5,
            "pace": 1e-4,
        }

    def _begin_save(self, staged: str) -> dict[str, Any]:
        self.staged = Path(staged)
        return {"optimizer_step": 1, "parameters": {f"model.layers.{n}.weight": [4096, 4096] for n in range(291)}}

    def _is_saving(self) -> bool:
        return False

    def _finish_save(self) -> Any:
        from training.checkpoint.format import File

        name = f"trainer-{time.monotonic_ns()}.safetensors"
        (self.staged / name).write_bytes(b"0")
        return [File(name, 1, 0, "0" * 32)]


class _Hooks:
    """What a run offers, as cheap as it can be."""

    job_hash = "0" * 16
    job_hash_before = ""
    resume_at: int | None = None
    accepted_before = 0
    skipped = frozenset[int]()

    def __init__(self, folder: Path):
        from training.checkpoint.repository import opened
        from training.storage import open_storage

        self.checkpoints = opened(open_storage(folder), 1)
        self.profiles = open_storage(folder / "profiles")
        self.seconds: dict[str, float] = {}

    def event(self, kind: str, **info: Any) -> None:
        if kind == "checkpoint":
            self.seconds["checkpoint_s"] = info["seconds"]

    def log(self, row: Mapping[str, Any]) -> None: ...
    def answers(self, step: int, kind: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def paces(self, seconds_a_token: Any) -> None: ...
    def gpus_full(self, fractions: Any) -> None: ...
    def flush(self) -> None: ...
    def started(self, info: PhaseInfo, step: int, *, evaluates: bool = False) -> None: ...
    def make_room(self, best: Any) -> None: ...
    def save_requested(self, step: int) -> bool:
        return False

    def clock(self) -> float:
        return time.monotonic()

    def stop_requested(self) -> bool:
        return False


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """One after the other, on one Ray."""
    import ray

    ray.init(
        num_cpus=max(SIZES) + _PROCESSES, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20
    )
    try:
        place: Any = ray.remote(FakePlace).options(num_cpus=0, max_concurrency=2)
        places = [place.remote() for _ in range(_PROCESSES)]
        ray.get([place.health.remote() for place in places])
        by_size = {size: _with(size, places, folder / str(size)) for size in SIZES}
    finally:
        ray.shutdown()
    return {"targets": {"share": TARGET, "growth": 1.0}, "workers": by_size, **summary(by_size)}


def summary(by_size: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """The claims: what the most workers take of a step of STEP_S, and how costs grow against their number.

    Workers wait for a call's cost; the looks at them fall into the time in which they compute.
    """
    most, some = max(by_size), sorted(by_size)[-3]
    growth = {
        name: round(by_size[most][name] / by_size[some][name] / (most / some), 3)
        for name in ("gather_s", "call_s", "look_s", "checkpoint_s")
    }
    shares = {name: by_size[most][name] for name in ("call_share", "look_share")}
    return {**shares, "growth": growth}


def _with(size: int, places: list[Any], folder: Path) -> dict[str, float]:
    import ray

    from launcher.workers import placement as machines
    from launcher.workers.watchdog import Watch
    from launcher.workers.worker_group import RoleGroup, WorkerGroup, rank_infos_for
    from training.config import Resources
    from training.drivers import supervised

    began = time.perf_counter()
    placement = machines.gather({"CPU": 1.0}, wanted=size, least=size, wait_s=60, avoid=frozenset(), say=lambda _: None)
    ray.util.remove_placement_group(placement)
    gather = time.perf_counter() - began

    group = WorkerGroup.__new__(WorkerGroup)
    here = ray.nodes()[0]["NodeID"]
    group.resources, group.size, group.logs, group.warn = Resources(workers=size), size, folder, lambda _: None
    group.actors = [places[rank % len(places)] for rank in range(size)]
    group.places = [
        {"node": here, "address": f"10.0.{rank // _MATES // 256}.{rank // _MATES % 256}", "gpus": [], "cores": 8}
        for rank in range(size)
    ]
    began = time.perf_counter()
    rank_infos_for(group.places, group.resources, "cpu", "10.0.0.1", 1)
    group.watch = Watch(group, group.warn)
    group.watch.arrived()
    settle = time.perf_counter() - began

    phase = SFT.model_validate(
        {
            "recipe": "sft",
            "model": {"path": "-"},
            "data": {"train": "-"},
            "batch": max(64, size),
            "max_steps": _STEPS,
            "checkpoint": {"every": 1000},
        }
    )
    hooks, trainer = _Hooks(folder / "checkpoints"), _Timed(RoleGroup(group, "trainer"))
    chosen = supervised._steps_in_a_call
    steps = chosen(STEP_S, size, within_s=supervised._TARGET_CALL_S)
    supervised._steps_in_a_call = lambda *pace, within_s=0.0: 1  # the workers' own steps take no time here
    try:
        supervised.run(phase, {"trainer": trainer}, hooks)
    finally:
        supervised._steps_in_a_call = chosen
    call, own = (sorted(each)[len(each) // 2] for each in (trainer.seconds, trainer.own_seconds))
    look = min(_look(group) for _ in range(4))
    looks = STEP_S / group.watch.every_s
    return {
        "gather_s": round(gather, 4), "settle_s": round(settle, 4), "call_s": round(call, 5),
        "call_of_the_driver_s": round(own, 5), "look_s": round(look, 5),
        "steps_a_call": steps, "looks_a_step": round(looks, 2), "checkpoint_s": hooks.seconds["checkpoint_s"],
        "call_share": round(call / steps / STEP_S, 5),
        "look_share": round(looks * look / STEP_S, 5),
    }  # fmt: skip


def _look(group: Any) -> float:
    group.watch._last = 0.0
    began = time.perf_counter()
    group.watch.look("train", 1.0)
    spent = time.perf_counter() - began
    time.sleep(0.5)  # for the answers
    return spent


class _Timed:
    """A group, and how long its calls to train took from the first word to the last answer."""

    def __init__(self, group: Any):
        self.group, self.size = group, group.size
        self.seconds: list[float] = []
        self.own_seconds: list[float] = []
        """Of the driver's process alone, all its threads."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "train":
            return self.group.call(method, *args, **kwargs)
        from training.group import Done, results

        began, worked = time.perf_counter(), time.process_time()
        answers = results(self.group.call(method, *args, **kwargs), 600)
        self.seconds.append(time.perf_counter() - began)
        self.own_seconds.append(time.process_time() - worked)
        return [Done(answer) for answer in answers]

    def map(self, *args: Any) -> Any:
        return self.group.map(*args)
