"""A real sshd on loopback, with keys of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")


def make_key(path: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, timeout=60)
    return path


@contextmanager
def sshd(folder: Path, port: int, host_key: Path, client_key: Path) -> Iterator[None]:
    """Lets whoever has `client_key` in as the user who runs the tests."""
    Path("/run/sshd").mkdir(exist_ok=True)
    lines = [
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {host_key}", f"AuthorizedKeysFile {client_key}.pub",
        "UsePAM no",
        "StrictModes no", f"PidFile {folder}/sshd.pid", "PermitRootLogin yes",
    ]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    with (folder / "sshd.log").open("a") as log:
        command = [str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "LANG": "C"})
    try:
        _await_port(port, folder / "sshd.log")
        yield
    finally:
        process.terminate()
        process.wait(30)


def _await_port(port: int, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())
