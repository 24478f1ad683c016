"""SFT of Muster against every peer that runs here, each at its best settings: tokens/s,
seconds to the first step, memory."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environments, sft, workload
from benchmarks.options import Options, Skipped
from benchmarks.processes import CommandFailed, run
from benchmarks.record import ROOT, largest_difference, ratios, spread

ROWS = 2000
TARGETS = {"ratio": 1.0, "start_ratio": 0.8, "memory_ratio": 1.0, "loss_difference": 1e-5}
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
"""For scripts of peers."""


class Kind(NamedTuple):
    """Of work."""

    lengths: workload.Lengths
    lora: dict[str, int] | None = None


KINDS = {
    "gsm8k": Kind(workload.GSM8K),
    "packed": Kind(workload.GSM8K),
    "skewed": Kind(workload.SKEWED),
    "lora": Kind(workload.GSM8K, {"rank": 8, "alpha": 16}),
}


class Layout(NamedTuple):
    """How a peer lays out the 16 rows of a step on two processes."""

    rows: int
    """Of a micro-batch, each padded to the longest."""
    accumulate: int
    """Micro-batches of a process in a step."""
    pack: bool = False
    """Fill a row with samples of the whole file. The steps then hold other samples than Muster's."""


def accelerate(python: Path, zero: Path) -> list[str]:
    launch = [str(python), "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1"]
    processes = ["--num_processes", str(sft.WORKERS), "--main_process_port", "0"]
    return [*launch, *processes, "--deepspeed_config_file", str(zero)]


def torchrun(python: Path, zero: Path) -> list[str]:
    return [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(sft.WORKERS)]


class Peer(NamedTuple):
    """Who trains the same."""

    layouts: Mapping[str, Layout]
    """By kind of work (benchmarks/README.md says how they were found)."""
    environment: environments.Environment | None = None
    """Where `benchmarks/peer_NAME.py` runs. None: `plain_loop.py` in Muster's own."""
    launch: Callable[[Path, Path], list[str]] = torchrun
    """From its python and a file of DeepSpeed's settings: the beginning of the command."""


_UNPACKED = {"gsm8k": Layout(2, 4), "skewed": Layout(1, 8)}
_PACKED = Layout(1, 3, pack=True)
"""With batches of 16 samples Muster has 2.5 packed rows of 512 tokens a worker on average."""
PEERS = {
    "trl": Peer({**_UNPACKED, "packed": _PACKED, "lora": _PACKED}, environments.TRL, accelerate),
    "llamafactory": Peer(_UNPACKED, environments.LLAMAFACTORY),
    "openrlhf": Peer(_UNPACKED, environments.OPENRLHF),
    "loop": Peer(_UNPACKED),
}


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Muster and a peer in turn, one kind of work after the other, one peer after the other."""
    works = {name: apart(workload.make, folder / name, ROWS, lengths=kind.lengths) for name, kind in KINDS.items()}
    return {
        "stage": options.stage,
        "steps": options.steps,
        "targets": TARGETS,
        **{name: _against(name, works, options, folder) for name in PEERS if options.only in (None, name)},
    }


def apart(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call in a process of its own.

    What it imports must not stay here: one side would share those pages with this process and seem to need less memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(make, *args, **kwargs).result()


def _against(name: str, works: Mapping[str, workload.Workload], options: Options, folder: Path) -> dict[str, Any]:
    peer = PEERS[name]
    try:
        python = environments.python_of(peer.environment, folder) if peer.environment else Path(sys.executable)
        kinds = {kind: _compare(name, kind, works[kind], options, python) for kind in peer.layouts}
    except Skipped as reason:
        return {"skipped": str(reason)}
    return {"peer": peer.environment.packages if peer.environment else [], **kinds}


def _compare(name: str, kind: str, work: workload.Workload, options: Options, python: Path) -> dict[str, Any]:
    layout, lora = PEERS[name].layouts[kind], KINDS[kind].lora
    training = sft.Training(
        steps=1 + options.steps, stage=options.stage, lora=lora, watch_memory=True, timeout_s=options.timeout_s
    )
    folder, cache = work.model.parent, work.model.parent / "cache"
    ours, theirs = [], []
    for number in range(options.rounds):
        ours.append(sft.muster(work, training, folder / f"muster-{name}-{number}", cache).curve)
        try:
            theirs.append(train(name, work, training, layout, python))
        except CommandFailed as error:
            print(error, file=sys.stderr)
            raise Skipped(f"a run of {name} failed") from error
    return {"layout": layout._asdict(), **summary(ours, theirs, same_steps=not layout.pack and lora is None)}


def summary(ours: Sequence[sft.Curve], theirs: Sequence[sft.Curve], *, same_steps: bool) -> dict[str, Any]:
    """Ratios and what they are made of. `same_steps`: both sides learnt the same samples of the
    same weights in every step."""
    figures: dict[str, Any] = {}
    for ratio, of, digits in (
        ("ratio", "tokens_per_s", 1),
        ("start_ratio", "first_step_s", 2),
        ("memory_ratio", "peak_gib", 2),
    ):
        mine, other = ([getattr(curve, of) for curve in side] for side in (ours, theirs))
        figures[ratio] = ratios(mine, other)
        figures |= {f"muster_{of}": spread(mine, digits), f"peer_{of}": spread(other, digits)}
    if same_steps:
        return {**figures, "loss_difference": largest_difference(ours[0].losses, theirs[0].losses)}
    return {**figures, "muster_last_loss": ours[0].losses[-1], "peer_last_loss": theirs[0].losses[-1]}


def train(name: str, work: workload.Workload, training: sft.Training, layout: Layout, python: Path) -> sft.Curve:
    """The same training by a peer, with caches of its own beside the rows. Raises CommandFailed."""
    folder, cache = work.model.parent, work.model.parent / f"{name}-cache"
    if PEERS[name].environment is None:
        return sft.plain_loop(work, training, "padded", cache, ["--rows-a-device", str(layout.rows)])
    zero = folder / "zero.json"
    zero.write_text(json.dumps(zero_settings(training.stage)))
    out = tempfile.mkdtemp(dir=folder)  # new for every run: LLaMA-Factory refuses one that it has written to
    places = (ROOT / "benchmarks" / f"peer_{name}.py", work.model, work.rows, out, "--zero", zero)
    command = [*PEERS[name].launch(python, zero), *map(str, places), *_words(work, training, layout)]
    env = {**sft.environment(cache), **ENVIRONMENT}
    return sft.printed_curve(
        run(command, folder=folder, env=env, timeout_s=training.timeout_s, watch_memory=training.watch_memory)
    )


def _words(work: workload.Workload, training: sft.Training, layout: Layout) -> list[str]:
    """What peer_script.py reads."""
    settings = {
        "--recipe": training.recipe,
        "--steps": training.steps,
        "--rows-a-device": layout.rows,
        "--accumulate": layout.accumulate,
        "--processes": sft.WORKERS,
        "--rate": sft.RATE,
        "--max-length": work.max_tokens,
        "--lora": training.lora["rank"] if training.lora else 0,
    }
    return [str(word) for pair in settings.items() for word in pair] + (["--pack"] if layout.pack else [])


def zero_settings(stage: int) -> dict[str, Any]:
    """Of DeepSpeed, for trainers of transformers."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
