"""What works with which causal architecture of transformers: every one that can be built tiny,
through Muster's own commands.

Each has a process of its own, forked from one that has imported everything, with a limit of time and memory. Writes
docs/reference/models.md when all of them were looked at.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import architecture_page, tiny_models
from benchmarks.architecture_columns import COLUMNS, CRASH, FAULTS, Architecture, Cell, examine
from benchmarks.options import Options

LIMIT_S = 300.0
"""Of one architecture; most take three seconds."""
LIMIT_BYTES = 6 << 30
IMPORTS = (
    "deepspeed", "peft", "transformers.integrations.deepspeed", "training.roles.language", "training.roles.reward",
    "training.models.probe", "launcher.driver.check", "launcher.driver.driver", "launcher.inference.generate",
    "launcher.inference.export", "benchmarks.architecture_columns", "transformers.models.llama.modeling_llama",
    "rich.console",
)  # fmt: skip


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Counts of each column, every cell that is no plain yes, and what could not be built;
    `wrong`: whether there is a fault."""
    names = options.types or tiny_models.types()
    began = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(lambda name: look_at(name, folder), names))
    figures = figures_of(found)
    figures["minutes"] = round((time.monotonic() - began) / 60, 1)
    if not options.types and options.record:
        architecture_page.write(found)
    return figures


def figures_of(found: Sequence[Architecture]) -> dict[str, Any]:
    built = [each for each in found if not each.not_built]
    counts = {name: dict(Counter(each.cells[name].verdict for each in built)) for name in COLUMNS}
    faults = {
        each.model_type: wrong
        for each in built
        if (
            wrong := {
                name: f"{cell.verdict}: {cell.detail}" for name, cell in each.cells.items() if cell.verdict in FAULTS
            }
        )
    }
    return {
        "architectures": len(built),
        "columns": counts,
        "faults": faults,
        "not_built": {each.model_type: each.not_built for each in found if each.not_built},
        "wrong": bool(faults),
    }


def look_at(model_type: str, folder: Path, limit_s: float = LIMIT_S) -> Architecture:
    """All columns of one architecture. What a process that ends or takes too long has not told is a crash."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    ours, theirs = context.Pipe(duplex=False)
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f"{model_type}-", dir=folder))
    process = context.Process(target=_work, args=(theirs, model_type, str(work)), daemon=True)
    process.start()
    theirs.close()
    found = Architecture(model_type)
    why = ""
    try:
        for name, cell in _received(ours, began + limit_s):
            if name == "not built":
                found.not_built = cell.detail
            else:
                found.cells[name] = cell
    except TimeoutError:
        why = f"took more than {limit_s:.0f} s"
    finally:
        process.kill()
        process.join()
    if not found.not_built:
        why = why or f"its process has ended with exit status {process.exitcode}"
        found.cells |= {name: Cell(CRASH, why) for name in COLUMNS if name not in found.cells}
    found.seconds = round(time.monotonic() - began, 1)
    print(_line(found), file=sys.stderr, flush=True)
    return found


def _line(found: Architecture) -> str:
    """For whoever waits."""
    cells = found.not_built and f"not built: {found.not_built}"
    cells = cells or ", ".join(f"{name} {cell.verdict}" for name, cell in found.cells.items())
    return f"{found.model_type} ({found.seconds:.0f} s): {cells}"


def _received(pipe: Any, until: float) -> Iterator[tuple[str, Cell]]:
    """What the process sends, to its end. Raises TimeoutError."""
    while True:
        if not pipe.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError
        try:
            yield pipe.recv()
        except (EOFError, ConnectionError):
            return


def _work(pipe: Any, model_type: str, folder: str) -> None:
    """In the process of one architecture."""
    import torch
    from transformers.utils import logging

    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ["MUSTER_CACHE"] = f"{folder}/cache"
    os.chdir(folder)
    with (Path(folder) / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            for name, cell in examine(model_type, Path(folder)):
                pipe.send((name, cell))
        except tiny_models.CannotBuild as error:
            pipe.send(("not built", Cell("", " ".join(str(error).split()))))
