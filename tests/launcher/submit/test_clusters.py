"""Cluster files and names: what they may say, what is told when they are wrong, before anything is started."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from cluster import registry as homes
from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from cluster.providers import findings_of, local
from cluster.ray_node import Node
from cluster.remote_shell import HERE, all_of, on_all
from cluster.spec import SPECS
from launcher.submit import clusters, jobs
from tests.support.raw_server import CUT, ODD_JSON, RawServer, whole
from training.errors import InputError

CONFIGS = Path(__file__).parents[3] / "configs" / "clusters"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MUSTER_HOME", str(tmp_path / "muster"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)


def written(text: str) -> Path:
    Path("c.yaml").write_text(text)
    return Path("c.yaml")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_files_of_configs_are_right_and_say_what_would_be_done(file):
    spec = clusters.load(file)
    assert spec.provider == file.stem
    assert clusters.render(file)


def test_every_provider_has_a_file():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(SPECS)


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_what_ray_is_given_for_a_cloud_is_right_by_its_own_schema_and_opens_nothing(cloud):
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = clusters.render(CONFIGS / f"{cloud}.yaml")
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    assert {"--dashboard-host=127.0.0.1", "--num-gpus=0"} <= set(config["head_start_ray_commands"][0].split())
    assert "0.0.0.0" not in text
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in command
        assert 'RAY_AUTH_TOKEN_PATH="$HOME/.muster/token"' in command
    assert config["file_mounts"]["~/.muster/token"].endswith("/token")
    pools = {name: kind for name, kind in config["available_node_types"].items() if name != "head"}
    assert all(kind["resources"]["GPU"] == 8 for kind in pools.values())


def test_a_pool_that_is_on_demand_for_want_of_spot_machines_is_two_kinds_the_cheaper_first():
    kinds = yaml.safe_load(clusters.render(CONFIGS / "aws.yaml"))["available_node_types"]
    spot, other = kinds["a100-spot"], kinds["a100"]
    assert spot["priority"] > other["priority"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in other["node_config"]
    assert (spot["labels"]["muster/price"], other["labels"]["muster/price"]) == ("12", "22")


def test_paths_of_this_machine_begin_at_the_cluster_file(monkeypatch, tmp_path):
    file = written("provider: ssh\nkey: keys/mine\nhead: {host: a}\npools: {p: {hosts: [b]}}").absolute()
    monkeypatch.chdir("/")
    assert clusters.load(file).key == str(tmp_path / "keys/mine")
    monkeypatch.setenv("HOME", "/home/me")
    file.write_text(file.read_text().replace("keys/mine", "~/.ssh/mine"))
    assert clusters.load(file).key == "/home/me/.ssh/mine"
    files = clusters.load(CONFIGS / "aws.yaml").files
    assert [Path(here).resolve() for here in files.values()] == [CONFIGS.parents[1] / ".ci/cuda.lock"]


def test_labels_and_prices_of_pools_are_those_of_their_machines():
    text = (
        "provider: ssh\nhead: {host: a, price: 1}\npools: {p: {hosts: [b], gpu: A100, price: 2.5, labels: {team/rack: "
        "r-7}}}"
    )
    head, worker = clusters.render(written(text)).split("\n\n")
    assert "--labels=muster/price=1 " in head
    assert "--labels=team/rack=r-7,muster/price=2.5 " in worker
    assert """'--resources={"accelerator_type:A100": 1}'""" in worker


def test_a_job_that_asks_for_more_than_a_cluster_can_have_is_refused_before_anything_is_sent(muster, place):
    pools = "pools: {small: {instance: g5, max: 2, cpus: 8, gpus: 4, gpu: A10G}}"
    spec = clusters.load(written(f"provider: aws\nname: far\nregion: us-west-2\nhead: {{instance: m5}}\n{pools}"))
    homes.claim("far", {"spec": spec.model_dump(exclude_defaults=True), "mark": "m", "started": "now"})
    shared = ("storage=s3://b/runs", "--on", "far")
    workers = str(place / "job.yaml"), "resources.workers=9", "resources.gpus_per_worker=auto", "phases.sft.batch=9"
    answer = muster("submit", *workers, *shared)
    assert answer.status == 2
    told = "resources.workers: 9 workers need a GPU each; far has at most 8 (small: 2 of 4 A10G)"
    assert answer.errors == [f"command line: {told}"]
    answer = muster("submit", str(place / "job.yaml"), "resources={workers: 1, accelerator: H100}", *shared)
    assert answer.status == 2
    assert "1 workers need a GPU of type H100 each; far has none (small: 2 of 4 A10G)" in answer.err


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "name: x",
            [("c.yaml: provider: set it to local, existing, ssh, kubernetes, slurm, aws, gcp or azure")],
        ),
        (
            "provider: lokal",
            [
                (
                    "c.yaml:1: provider: set it to local, existing, ssh, kubernetes, slurm, "
                    "aws, gcp or azure; did you mean local?"
                )
            ],
        ),
        ("provider: local\ncpu: 4", ["c.yaml:2: cpu: unknown key; did you mean cpus?"]),
        ("provider: local\nname: -rf", ["c.yaml:2: name: "]),
        ("provider: existing\naddress: 10.0.0.5", ["c.yaml:2: address: "]),
        ("provider: existing", ["c.yaml: address: this key is required"]),
        (
            "provider: ssh\nhead: {host: -oProxyCommand=x}\npools: {a: {hosts: []}}\nstorage: runs",
            ["c.yaml:2: head.host: ", "c.yaml:3: pools.a.hosts: "],
        ),
        (
            "provider: ssh\nhead: {host: a}\npools: {p: {hosts: [b], labels: {rack: r 7}}}",
            ["c.yaml:3: pools.p.labels.rack: 'r 7' is no label of Ray's"],
        ),
        (
            "provider: ssh\nhead: {host: a}\npools: {a: {hosts: [b, a]}}",
            ["c.yaml: a: named more than once; a head that is to work too"],
        ),
        (
            "provider: ssh\nhead: {host: a}\npools: {a: {hosts: [b]}}\nstorage: runs",
            ["c.yaml:4: storage: runs: set a bucket, or the absolute path"],
        ),
    ],
)
def test_a_wrong_file_is_told_with_every_line(muster, text, messages):
    written(text)
    answer = muster("cluster", "up", "c.yaml")
    assert answer.status == 2
    lines = answer.err.splitlines()
    assert len(lines) == len(messages)
    assert all(line.startswith(message) for line, message in zip(lines, messages, strict=True)), answer.err
    assert homes.known() == []


@pytest.mark.parametrize(
    "verb", [("submit", "job.yaml"), ("run", "job.yaml"), ("list",), ("status", "x"), ("logs", "x"), ("stop", "x")]
)
def test_a_cluster_that_is_not_up_is_told(muster, verb):
    homes.claim("trial", {"spec": {"provider": "local", "name": "trial"}, "mark": "0", "started": ""})
    answer = muster(*verb, "--on", "trail")
    assert (answer.status, answer.err) == (
        2,
        "--on: trail: no cluster trail is running; did you mean trial?; `muster cluster up FILE` starts one\n",
    )


@pytest.mark.parametrize("verb", [("submit", "job.yaml"), ("logs", "x"), ("stop", "x")])
def test_verbs_of_clusters_want_to_know_which(muster, verb):
    assert muster(*verb).err == "command line: name the cluster with --on\n"


def test_somebody_elses_cluster_is_neither_started_nor_ended(muster):
    written("provider: existing\naddress: http://127.0.0.1:9")
    answer = muster("cluster", "up", "c.yaml")
    assert answer.status == 2
    assert "Muster does not start" in answer.err


def test_a_cluster_that_does_not_answer_is_told_plainly(muster):
    for verb in (("list",), ("logs", "-f", "x"), ("stop", "x")):
        answer = muster(*verb, "--on", "http://127.0.0.1:9")
        assert answer.status == 1
        assert "http://127.0.0.1:9 does not answer" in answer.err
    written("provider: existing\naddress: http://127.0.0.1:9\ntoken_file: nowhere")
    answer = muster("list", "--on", "c.yaml")
    told = f"{Path('nowhere').absolute()}: the token cannot be read: No such file or directory\n"
    assert (answer.status, answer.err) == (2, told)


def test_a_local_run_folder_is_refused_where_the_cluster_does_not_see_it(place, muster):
    (place / "c.yaml").write_text("provider: existing\naddress: http://127.0.0.1:9")
    answer = muster("submit", "job.yaml", "--on", "c.yaml")
    assert answer.status == 2
    assert "is a folder of this machine" in answer.err
    assert "set a bucket" in answer.err


def test_bad_jobs_are_refused_before_anything_is_sent(place, muster):
    (place / "c.yaml").write_text("provider: existing\naddress: http://127.0.0.1:9\nstorage: s3://b/runs")
    answer = muster("submit", "job.yaml", "phases.sft.batsh=1", "--on", "c.yaml")
    assert (answer.status, answer.err) == (2, "command line: phases.sft.batsh: unknown key; did you mean batch?\n")


def test_a_name_belongs_to_one_cluster_and_its_token_to_its_owner(tmp_path):
    home = homes.claim("one", {"spec": {}})
    assert len(home.token()) == 64
    assert home.token_file.stat().st_mode & 0o777 == 0o600
    assert home.folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(Refused, match="the cluster one exists already"):
        homes.claim("one", {"spec": {}})
    assert [known.name for known in homes.known()] == ["one"]
    assert homes.claim("two", {}).token() != home.token()


class _Broken:
    """A provider whose start fails or is interrupted, and whose end may fail too."""

    def __init__(self, error: BaseException, at_end: ClusterError | None = None):
        self.error, self.at_end, self.ended = error, at_end, 0

    def up(self, home, say):
        raise self.error

    def down(self, home, say):
        self.ended += 1
        if self.at_end:
            raise self.at_end


@pytest.mark.parametrize("error", [ClusterError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_start_that_fails_or_is_interrupted_leaves_nothing(monkeypatch, error):
    broken = _Broken(error)
    monkeypatch.setattr(clusters, "provider_of", lambda spec: broken)
    with pytest.raises(type(error)):
        clusters.up(written("provider: local"), lambda text: None)
    assert broken.ended == 1
    assert homes.known() == []


def test_what_cannot_be_ended_is_told_and_remembered(monkeypatch):
    broken = _Broken(ClusterError("b did not start"), ClusterError("b cannot be reached"))
    monkeypatch.setattr(clusters, "provider_of", lambda spec: broken)
    with pytest.raises(
        ClusterError,
        match="b did not start\nb cannot be reached\nparts of c still exist; retry with `muster cluster down c`",
    ):
        clusters.up(written("provider: local"), lambda text: None)
    assert [home.name for home in homes.known()] == ["c"]
    broken.at_end = None
    monkeypatch.setattr(jobs, "listing", lambda connection: [])
    clusters.down("c", lambda text: None)
    assert homes.known() == []


def test_answers_of_many_machines_come_with_the_troubles_of_all():
    def trouble():
        raise ClusterError("b is out")

    answers = on_all({"a": lambda: 1, "b": trouble})
    assert answers["a"] == 1
    with pytest.raises(ClusterError, match="^b is out$"):
        all_of(answers)


def test_only_marked_processes_are_ended(tmp_path):
    import os
    import subprocess

    def sleeper(mark: str) -> subprocess.Popen:
        return subprocess.Popen(["sleep", "60"], env={**os.environ, "MUSTER_CLUSTER": mark})

    ours, others = sleeper("test0001"), sleeper("test00010")
    folder = Path("/tmp/muster-test0001")
    folder.mkdir()
    try:
        Node(HERE, "python3", "test0001").end()
        assert ours.wait(60) == -15
        assert others.poll() is None
        assert not folder.exists()
    finally:
        others.kill()
        others.wait()


def test_a_failing_command_says_what_it_said():
    with pytest.raises(ClusterError, match="this machine failed: oh no"):
        HERE.run("echo oh no >&2; exit 3")
    with pytest.raises(ClusterError, match="did not answer within"):
        HERE.run("sleep 5", timeout_s=0.2)
    assert HERE.run("cat", given="secret") == "secret"


def test_json_of_no_clusters(muster):
    assert json.loads(muster("cluster", "status", "--json").out) == []
    assert "no clusters" in muster("cluster", "status").out


def test_a_local_cluster_listens_on_loopback_alone_in_what_it_renders():
    text = local.PROVIDER(clusters.load(CONFIGS / "local.yaml")).render()
    assert "--node-ip-address=127.0.0.1" in text
    assert "--dashboard-host=127.0.0.1" in text


def test_input_errors_of_files_name_the_file(muster):
    with pytest.raises(InputError, match="no such file"):
        clusters.load(Path("nowhere.yaml"))


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": self.headers["Authorization"]}).encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_what_is_on_this_machine_is_not_asked_for_through_a_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.com")
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert Dashboard(f"http://127.0.0.1:{server.server_port}", "t", "it").version() == "Bearer t"


class _OldRay(_Answers):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"version": "4", "ray_version": "2.49.0", "ray_commit": "c"}).encode())


def test_another_version_of_ray_is_told_with_what_to_do_on_which_side(muster, place, monkeypatch):
    from importlib.metadata import version

    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    with HTTPServer(("127.0.0.1", 0), _OldRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        answer = muster("submit", "job.yaml", "storage=s3://b/runs", "--on", address)
        server.shutdown()
    ours = version("ray")
    told = f"{address} runs Ray 2.49.0, but this machine has {ours}; install ray==2.49.0 here, or ray=={ours} there\n"
    assert (answer.status, answer.err) == (2, told)


def test_what_is_wrong_with_machines_is_told_with_the_side_to_change():
    from importlib.metadata import version

    def machine(python: str = "3.11.7", ray: str | None = version("ray"), off: float = 0.0):
        info = {"python": python, "executable": "/p", "cores": 8, "time": time.time() + off, "versions": {"ray": ray}}
        return lambda: info

    def unreachable():
        raise ClusterError("f cannot be reached: no route")

    found = findings_of({
        "a": machine(), "b": machine(python="3.11.2"), "c": machine(python="3.10.1"), "d": machine(ray="2.9.0"),
        "e": machine(off=90),
        "f": unreachable, "g": machine(ray=None),
    })  # fmt: skip
    assert [(finding.what, finding.well) for finding in found][:2] == [("a", True), ("b", True)]
    assert not any(finding.well for finding in found[2:])
    advice = {finding.what: f"{finding.found}; {finding.advice}" for finding in found}
    assert "install Python 3.11 there, as on the first machine" in advice["c"]
    assert f"install Ray {version('ray')} there" in advice["d"]
    assert "its clock is 90 s off ours; let it follow a time server" in advice["e"]
    assert "cannot be reached: no route" in advice["f"]
    assert "install ray for /p" in advice["g"]


@pytest.mark.parametrize("reply", [*CUT.values(), *map(whole, ODD_JSON.values())])
def test_a_dashboard_that_cuts_its_replies_or_speaks_of_something_else_is_told_of(reply):
    with RawServer(reply) as server:
        dashboard = Dashboard(server.url, None, "gpus")
        for ask in (dashboard.version, dashboard.nodes):
            with pytest.raises(ClusterError, match="gpus "):
                ask()
