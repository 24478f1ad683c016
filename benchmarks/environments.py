"""The environments in which peers run: a folder each in build/benchmarks, built by pip on first use."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import Skipped
from benchmarks.processes import CommandFailed, run
from benchmarks.record import ROOT

VENVS = ROOT / "build" / "benchmarks"
_BUILD_S = 1200.0


@dataclass(frozen=True)
class Environment:
    """What a peer needs, pinned."""

    name: str
    pins: tuple[str, ...]
    bare: tuple[str, ...] = ()
    """Installed without what they ask for, which needs a GPU or its libraries; `pins` has the rest."""

    @property
    def packages(self) -> list[str]:
        return [*self.bare, *self.pins]


def python_of(wanted: Environment, folder: Path) -> Path:
    """The python of an environment, built if it is not there. Raises Skipped if it cannot be built."""
    venv = VENVS / wanted.name
    python, ready = venv / "bin" / "python", venv / ".ready"
    content = "\n".join(wanted.packages) + "\n"
    if ready.exists() and ready.read_text() == content:
        return python
    print(f"building {venv} with {', '.join(content.split())}: minutes", file=sys.stderr)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", str(venv)], [*pip, *wanted.pins]]
    if wanted.bare:
        commands.append([*pip, "--no-deps", *wanted.bare])
    try:
        for command in commands:
            run(command, folder=folder, env={}, timeout_s=_BUILD_S)
    except CommandFailed as error:
        raise Skipped(f"the environment {wanted.name} cannot be built: {error}") from error
    ready.write_text(content)
    return python


TRL = Environment(
    "trl",
    (
        "trl==1.16.0",
        "torch==2.13.0",
        "deepspeed==0.19.8",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "transformers==5.23.0",
        "peft==0.21.2",
    ),
)
TRL_PPO = Environment("trl-ppo", ("trl==1.12.0", *TRL.pins[1:]))
"""The last version that has PPO."""
LLAMAFACTORY = Environment(
    "llamafactory",
    (
        "trl==0.24.0",
        "torch==2.13.0",
        "deepspeed==0.19.8",
        "accelerate==1.11.0",
        "datasets==4.0.0",
        "transformers==5.6.0",
        "peft==0.18.1",
        "torchdata==0.11.0",
        "av==16.0.0",
        "omegaconf==2.4.0",
        "matplotlib==3.11.2",
        "scipy==1.17.1",
        "sentencepiece==0.2.3",
        "pillow==11.3.0",
    ),
    bare=("llamafactory==0.9.5",),
)
OPENRLHF = Environment(
    "openrlhf",
    (
        "deepspeed==0.19.6",
        "torch==2.13.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "transformers==5.15.0",
        "peft==0.21.2",
        "torchdata==0.11.0",
        "pylatexenc==2.10",
    ),
    bare=("openrlhf==0.11.2",),
)
