"""Says which lock file fits the file of torch that pip takes on this machine: prints `cpu`
or `cuda`, and why on stderr.

A machine that has a file of torch for CPUs at hand needs none of CUDA's libraries; from the index alone, torch on Linux
asks for all of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


def main() -> None:
    pin = re.search(r"^torch==[^\s+]+", Path(__file__).with_name("cpu.lock").read_text(), re.MULTILINE)
    assert pin, "cpu.lock has no torch"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    report = subprocess.run([*command, "--report", "-", pin[0]], stdout=subprocess.PIPE, check=True).stdout
    (torch,) = json.loads(report)["install"]
    file = torch["download_info"]["url"].rpartition("/")[2].replace("%2B", "+")
    needs_cuda = any(re.match(r"(nvidia|cuda)-", need) for need in torch["metadata"]["requires_dist"])
    lock = "cuda" if needs_cuda and sys.platform == "linux" and "+cpu" not in file else "cpu"
    print(f"torch: {file}, with .ci/{lock}.lock", file=sys.stderr)
    print(lock)


if __name__ == "__main__":
    main()
