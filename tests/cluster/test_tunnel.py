"""Through SSH on a machine with other users: a tunnel nobody else can take over,
and host keys that are looked at. With a real sshd."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from cluster.providers.cloud import _host_keys_kept
from cluster.providers.local import LocalProvider
from cluster.registry import ClusterRecord
from cluster.remote_shell import Login, free_port
from cluster.spec import Local
from cluster.tunnel import tunnel
from tests.support.sshd_server import SSHD, make_key, sshd

pytestmark = pytest.mark.skipif(SSHD is None, reason="needs sshd (openssh-server)")
TOKEN = "token-of-the-cluster"
STRANGER = 65534


@pytest.fixture
def login(tmp_path):
    """How to get into a machine (this one), while its sshd runs."""
    port, client = free_port(), make_key(tmp_path / "client")
    options = ("StrictHostKeyChecking=accept-new", f"UserKnownHostsFile={tmp_path}/known_hosts")
    with sshd(tmp_path, port, make_key(tmp_path / "host"), client):
        yield Login(getpass.getuser(), port=port, key=str(client), options=options)


@pytest.fixture
def dashboard():
    """A server that answers as Ray's dashboard does, and remembers the tokens that it was given; its port."""
    tokens: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["Authorization"])
            body = b'{"ray_version": "1.2.3"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, tokens
        server.shutdown()


def as_a_stranger(code: str) -> str:
    """What Python code prints that another user runs. Raises CalledProcessError if it fails."""
    # Python may lie in our home
    drop = f"import contextlib, glob, os, socket; os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})\n"
    return subprocess.run(
        [sys.executable, "-c", drop + code], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_a_token_goes_through_a_tunnel_whose_ends_are_this_process_alone(login, dashboard):
    far, tokens = dashboard
    with tunnel("127.0.0.1", login, "127.0.0.1", far) as here:
        assert Dashboard(f"http://127.0.0.1:{here}", TOKEN, "x").version() == "1.2.3"
        assert tokens == [f"Bearer {TOKEN}"]
        mine = {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert here in mine
        (ssh,) = [child for child in psutil.Process().children() if child.name() == "ssh"]
        assert not [c for c in ssh.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        socket = Path(ssh.cmdline()[ssh.cmdline().index("-L") + 1].rpartition(f":127.0.0.1:{far}")[0])
        assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert not socket.parent.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")
def test_another_user_who_reads_the_list_of_processes_gets_nowhere(login, dashboard):
    far, tokens = dashboard
    with tunnel("127.0.0.1", login, "127.0.0.1", far) as here:
        assert (
            as_a_stranger(
                "words = []\n"
                "for file in glob.glob('/proc/[0-9]*/cmdline'):\n"
                "    with contextlib.suppress(OSError):\n"
                "        words += open(file).read().split(chr(0))\n"
                "(path,) = [word.rpartition(':127.0.0.1:')[0] for word in words if "
                f"word.endswith(':127.0.0.1:{far}')]\ndef tried(family, at, do):\n    try:\n        "
                "getattr(socket.socket(family), do)(at)\n    except OSError as error:\n        return "
                "type(error).__name__, error.errno\nprint(tried(socket.AF_UNIX, path, 'connect'), "
                f"tried(socket.AF_UNIX, path, 'bind'))\nprint(tried(socket.AF_INET, ('127.0.0.1', {here}), 'bind'))\n"
            )
            == "('PermissionError', 13) ('PermissionError', 13)\n('OSError', 98)\n"
        )
        assert Dashboard(f"http://127.0.0.1:{here}", TOKEN, "x").version() == "1.2.3"
    assert tokens == [f"Bearer {TOKEN}"]


def test_without_a_way_there_the_tunnel_says_why(login):
    wrong = Login(
        login.user,
        port=login.port,
        key=login.key,
        options=("StrictHostKeyChecking=yes", "UserKnownHostsFile=/dev/null"),
    )
    with (
        pytest.raises(ClusterError, match="no SSH tunnel to 127.0.0.1: No ED25519 host key is known"),
        tunnel("127.0.0.1", wrong, "x", 1),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")
def test_another_user_who_listens_in_place_of_a_cluster_on_this_machine_gets_no_token(tmp_path):
    home = ClusterRecord(tmp_path / "here")
    home.folder.mkdir(mode=0o700)
    home.token_file.write_text(TOKEN)
    code = (
        f"import os, socket; os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print(listener.getsockname()[1], flush=True)\n"
        "listener.accept()\nprint('was asked', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        home.write({"dashboard_port": int(stranger.stdout.readline())})
        provider = LocalProvider(Local(provider="local", name="here"))
        with pytest.raises(Refused, match=f"another user .uid {STRANGER}. listens on port"), provider.connection(home):
            pass
        stranger.kill()
        assert stranger.stdout.read() == ""


# Ray's launcher on clouds


def over_rays_launcher(home: ClusterRecord, port: int, client: Path) -> subprocess.CompletedProcess:
    """A command on the head with the options that Ray's launcher has for ssh while Muster uses it."""
    from ray.autoscaler._private import command_runner

    with _host_keys_kept(home):
        options = command_runner.SSHOptions(str(client))
    command = [
        "ssh",
        "-p",
        str(port),
        *options.to_ssh_options_list(timeout=10),
        "-o",
        "BatchMode=yes",
        "127.0.0.1",
        "echo in",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_head_with_another_key_than_at_first_gets_nothing_from_rays_launcher(tmp_path):
    home, port, client = ClusterRecord(tmp_path / "home"), free_port(), make_key(tmp_path / "client")
    home.folder.mkdir(mode=0o700)
    with sshd(tmp_path, port, make_key(tmp_path / "host"), client):
        assert over_rays_launcher(home, port, client).stdout == "in\n"
        assert over_rays_launcher(home, port, client).stdout == "in\n"
    with sshd(tmp_path, port, make_key(tmp_path / "other"), client):
        refused = over_rays_launcher(home, port, client)
    assert (refused.returncode, refused.stdout) == (255, "")
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in refused.stderr
