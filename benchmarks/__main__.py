"""`python -m benchmarks [NAME ...]`: measure, print one JSON line each, and append it to results/<machine>.jsonl."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu, trl_ppo
from benchmarks.options import Options, Skipped
from benchmarks.peers import PEERS
from benchmarks.processes import CommandFailed
from benchmarks.record import conditions, keep


class Benchmark(NamedTuple):
    """One row of the table."""

    module: str
    """Has `measure(options, folder) -> figures`. (Not named after a peer's package: scripts
    beside it import that by name.)"""
    what: str


BENCHMARKS = {
    "step": Benchmark(
        "benchmarks.step", "step time against a hand-written loop under torchrun + DeepSpeed (target: at most 1.05)"
    ),
    "start": Benchmark(
        "benchmarks.start", "from the command to the first finished step, against that loop (target: at most 1.3)"
    ),
    "save": Benchmark(
        "benchmarks.save",
        "stall, restore and size of checkpoints against DeepSpeed's own (targets: 0.1; 1.2; 1.1 of 12 bytes a "
        "parameter)",
    ),
    "recover": Benchmark(
        "benchmarks.recover", "from a killed worker to the next finished step, against a cold start (target: 1.0)"
    ),
    "stop": Benchmark(
        "benchmarks.stop",
        "from SIGTERM to the exit, by activity (target: 5 s beyond the work in progress); cost of checksums and HMAC",
    ),
    "lora": Benchmark("benchmarks.lora", "step time and memory of a worker with LoRA against all weights"),
    "generation": Benchmark(
        "benchmarks.generation",
        "generated tokens/s against transformers' generate with left padding (target: at least 1.0)",
    ),
    "ppo": Benchmark(
        "benchmarks.ppo",
        "PPO: the driver's share of an iteration (target: 0.02), weights sent against a copy in memory, memory with "
        "LoRA",
    ),
    "overlap": Benchmark(
        "benchmarks.overlap",
        "PPO with a rollout group: time of an iteration scored in rounds and written ahead, against taking turns; "
        "what is learnt",
    ),
    "submit": Benchmark(
        "benchmarks.submit",
        "a job handed to a cluster: seconds to its first line against `ray job submit` (target: 2 more), following "
        "again, growing",
    ),
    "scale": Benchmark(
        "benchmarks.scale",
        "the driver with 1 to 1,024 workers that answer at once (targets: 0.01 of a step of 10 s; at most linear)",
    ),
    "data": Benchmark(
        "benchmarks.data",
        "rows/s and memory from files to tokens against datasets.map (target: above 1.0, flat); how long a step waits "
        "for data (target: 0.01)",
    ),
    "peers": Benchmark(
        "benchmarks.peers",
        "SFT against TRL, LLaMA-Factory, OpenRLHF, a loop: tokens/s, start, memory (targets: at least 1.0; at most "
        "0.8; 1.0)",
    ),
    "trl-reward": Benchmark(
        "benchmarks.trl_reward",
        "reward model pairs/s against TRL under accelerate + ZeRO-2 (target: at least 1.2)",
    ),
    "trl-ppo": Benchmark(
        "benchmarks.trl_ppo",
        "seconds of an iteration of PPO against TRL's under accelerate + ZeRO-2 (target: 0.5)",
    ),
    "architectures": Benchmark(
        "benchmarks.architectures",
        "what works with which causal architecture of transformers, against transformers and PEFT (target: nothing "
        "wrong)",
    ),
    "gpu": Benchmark(
        "benchmarks.gpu",
        "one GPU: tokens/s, MFU (targets: 0.5; 0.45) and memory of 7B LoRA and 1B full, what each choice brings, PPO "
        "of 1B",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a benchmark failed or has found something wrong.
    A benchmark that a machine cannot run is no failure."""
    parsed = _parser().parse_args(arguments)
    if parsed.list:
        print("\n".join(f"{name:<12}{benchmark.what}" for name, benchmark in BENCHMARKS.items()))
        return 0
    options = Options(
        rounds=parsed.rounds, steps=parsed.steps, stage=parsed.stage, timeout_s=parsed.timeout, only=parsed.only,
        types=tuple(parsed.types), record=not parsed.no_record,
    )  # fmt: skip
    return max([_run(name, options) for name in parsed.names or BENCHMARKS])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", type=_name, help=f"{', '.join(BENCHMARKS)}; all if none is given"
    )
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="how often each side runs (%(default)s)")
    parser.add_argument("--steps", type=int, default=Options.steps, help="steps that count in a run (%(default)s)")
    parser.add_argument("--stage", type=int, default=Options.stage, choices=(1, 2, 3), help="ZeRO (%(default)s)")
    parser.add_argument(
        "--only", choices=(*PEERS, *trl_ppo.KINDS, *gpu.CASES, gpu.PPO), help="one part of peers, trl-ppo or gpu"
    )
    parser.add_argument(
        "--types", nargs="+", default=[], metavar="TYPE", help="architectures: these model types alone, such as llama"
    )
    parser.add_argument("--timeout", type=float, default=Options.timeout_s, help="s, of one run (%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="print the line, do not append it to the results")
    return parser


def _name(text: str) -> str:
    if text not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"there is no benchmark {text}; there are {', '.join(BENCHMARKS)}")
    return text


def _run(name: str, options: Options) -> int:
    row: dict[str, Any] = {"benchmark": name, **conditions()}
    try:
        with tempfile.TemporaryDirectory(prefix="muster-bench-") as folder:
            row |= import_module(BENCHMARKS[name].module).measure(options, Path(folder))
    except Skipped as reason:
        row["skipped"] = str(reason)
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(row), flush=True)
    if options.record:
        keep(row)
    return int(bool(row.get("wrong")))


if __name__ == "__main__":
    raise SystemExit(main())
