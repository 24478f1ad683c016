"""Slurm: a job is an allocation in which Ray lives as long as the job.
Submitted with sbatch, looked at with squeue, ended with scancel.

FOLDER/ID/ has all there is of a job: bundle.zip, job.json, batch.sh, out.log, the Slurm job's number, how it ended. The
nodes and the login machine see it, so nothing else has to be asked where accounting is off.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from cluster.providers import NO_METRICS_PORTS, Finding, Say, findings_of
from cluster.ray_node import Node
from cluster.registry import ClusterRecord
from cluster.remote_shell import HERE, Login, over_ssh
from cluster.spec import Slurm

_SAVE_S = 7200.0
"""Longest time for a run to save: the step in hand ends before, of PPO an iteration."""
_PORTS = 20_000, 20_000
"""First port of Ray's head, and how many there are: the job's number picks one, since jobs may share a node."""
_FIELDS = ("id", "job", "submitted", "status", "ended", "asked_to_stop", "state", "reason")
_LIST = """
cd {folder} 2> /dev/null || exit 0
queue="$(squeue --noheader --me --format='%A|%T|%r' 2> /dev/null)" || {{ echo "squeue does not answer" >&2; exit 1; }}
for job in */job.json; do
  [ -e "$job" ] || continue
  id="${{job%/job.json}}"
  number="$(cat "$id/number" 2> /dev/null)"
  since() {{ date -u -r "$id/$1" +%FT%TZ 2> /dev/null; }}
  ended="$(cat "$id/status" 2> /dev/null)"
  state="$(echo "$queue" | grep "^$number|" | cut -d'|' -f2,3)"
  echo "$id|$(base64 -w0 "$job")|$(since job.json)|$ended|$(since status)|$(since stop)|$state"
done
"""


class SlurmProvider:
    def __init__(self, spec: Slurm):
        self.spec = spec
        login = Login(spec.user, spec.ssh_port, spec.key, spec.ssh_options)
        self._login = over_ssh(spec.login, login) if spec.login else HERE

    # What all providers can do

    def render(self) -> str:
        return self.batch_script("JOB", workers=2 * self.spec.workers_per_node, names=())

    def up(self, home: ClusterRecord, say: Say) -> None:
        raise Refused(
            f"{self.spec.name} is a Slurm cluster, which is not started; request an allocation with "
            "`muster submit JOB --on FILE`"
        )

    def down(self, home: ClusterRecord, say: Say) -> None:
        raise Refused(
            f"{self.spec.name} is a Slurm cluster, which is not ended; end a job with `muster stop ID --on FILE`"
        )

    @contextmanager
    def connection(self, home: ClusterRecord | None) -> Iterator[Dashboard]:
        raise Refused("a job in a Slurm allocation has no dashboard")
        yield

    def doctor(self) -> list[Finding]:
        where = self.spec.login or "this machine"
        findings = findings_of({where: Node(self._login, self.spec.python).look})
        partition = f"--partition={shlex.quote(self.spec.partition)}" if self.spec.partition else ""
        checks = {
            "Slurm": (
                f"sinfo --noheader {partition} --format='%P %D nodes %a' | grep .",
                "load the Slurm module, or set `login` and `partition`",
            ),
            "the folder": (
                f"mkdir -p {self._folder} && touch {self._folder}/.try && rm {self._folder}/.try && echo can be "
                "written",
                "choose a `folder` that you can write to and all nodes can access",
            ),
        }
        for what, (script, advice) in checks.items() if findings[0].well else ():
            try:
                findings.append(Finding(what, True, "; ".join(self._login.run(script).splitlines())))
            except ClusterError as error:
                findings.append(Finding(what, False, str(error), advice))
        return findings

    # Jobs

    @property
    def _folder(self) -> str:
        return shlex.quote(self.spec.folder)

    def _of(self, name: str) -> str:
        return f"{self._folder}/{shlex.quote(name)}"

    def submit(
        self, name: str, bundle: bytes, info: Mapping[str, Any], *, workers: int, environment: Mapping[str, str],
        words: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """Ask for an allocation; returns the Slurm job's number. Raises Refused with what sbatch says."""
        script = self.batch_script(name, workers=workers, names=tuple(environment), words=words)
        values = "".join(f"{base64.b64encode(value.encode()).decode()}\n" for value in environment.values())
        lines = [
            "set -e",
            f"mkdir -p {self._folder}; mkdir -m 700 {self._of(name)}; cd {self._of(name)}",
            # standard input: the values of the environment, a line each, then the bundle
            *(f'read -r value; export {variable}="$(echo "$value" | base64 -d)"' for variable in environment),
            "base64 -d > bundle.zip",
            f"printf %s {shlex.quote(script)} > batch.sh",
            f"printf %s {shlex.quote(json.dumps(info))} > job.json",
            'sbatch --parsable batch.sh > number || { rm -rf "$PWD"; exit 1; }',
            "cat number",
        ]
        try:
            return self._login.run(
                "\n".join(lines), given=values + base64.b64encode(bundle).decode(), timeout_s=300
            ).strip()
        except ClusterError as error:
            raise Refused(f"Slurm rejects the job: {error}") from None

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs in the folder, the oldest first."""
        rows = [line.split("|") for line in self._login.run(_LIST.format(folder=self._folder)).splitlines()]
        return sorted(
            (self._info(dict(zip(_FIELDS, row, strict=False))) for row in rows), key=lambda info: info["submitted"]
        )

    def _info(self, row: dict[str, str]) -> dict[str, Any]:
        info = json.loads(base64.b64decode(row["job"]))
        status, in_queue, asked_to_stop = row["status"], row.get("state") or "", row["asked_to_stop"]
        told = ""
        if in_queue and not status:
            state = {"PENDING": "pending"}.get(in_queue, "running")
            told = f"waits: {row['reason']}" if state == "pending" else ""
        elif asked_to_stop and status in ("", "75"):  # no status: it was still waiting
            state = "stopped"
        elif status:
            state = "succeeded" if status == "0" else "failed"
        else:
            state, told = "failed", "is no longer in the Slurm queue"
        return {
            "id": row["id"],
            **info,
            "state": state,
            "message": told,
            "submitted": row["submitted"],
            "ended": row["ended"] or asked_to_stop or None,
            "exit_status": int(status) if status.isdigit() else None,
        }

    def output(self, name: str, seen: int) -> bytes:
        """What a job has printed since byte `seen`."""
        script = f"tail -c +{seen + 1} {self._of(name)}/out.log 2> /dev/null | base64 -w0"
        return base64.b64decode(self._login.run(script))

    def save(self, name: str, run: str) -> str:
        """Ask the driver of a job to save, by the run's folder, which the login machine sees
        as the nodes do; what is printed there."""
        command = shlex.join(["-P", "-m", "launcher.cli.cluster_save", run])
        lines = [f"cd {self._of(name)}", *self.spec.setup, f'cd code; PYTHONPATH="$PWD" {self.spec.python} {command}']
        return self._login.run("\n".join(lines), timeout_s=_SAVE_S)

    def stop(self, name: str) -> None:
        """Ask a job to save and end."""
        lines = [
            f"cd {self._of(name)}; touch stop",
            # One that waits is taken away, one that runs ends by itself when it has saved.
            'scancel --state=PENDING "$(cat number)"',
            'scancel --batch --signal=TERM "$(cat number)" 2> /dev/null || true',
        ]
        self._login.run("\n".join(lines))

    def batch_script(self, name: str, *, workers: int, names: tuple[str, ...], words: Sequence[str] = ()) -> str:
        """What Slurm runs on the first node of the allocation."""
        spec = self.spec
        lines = [
            "#!/bin/bash -l",
            *(f"#SBATCH {option}" for option in self._options(name, workers, names)),
            "",
            f"cd {self._of(name)}",
            *spec.setup,
            f'export PATH="$(dirname "$({spec.python} -c "import sys; print(sys.executable)")"):$PATH"',
            "[ -d code ] || { rm -rf draft; python -m zipfile -e bundle.zip draft && mv draft code; }",
            'cd code; rm -f ../ray.log; export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
            *self._start_ray(),
            *_run_job(words),
            "",
        ]
        return "\n".join(lines)

    def _options(self, name: str, workers: int, names: tuple[str, ...]) -> list[str]:
        """Options of sbatch; `names`: the environment variables that go along."""
        spec = self.spec
        return [
            f"--job-name={name}", f"--nodes={-(-workers // spec.workers_per_node)}", "--ntasks-per-node=1",
            *self._of_a_node(),
            *(f"--{key}={value}" for key in ("partition", "account", "qos") if (value := getattr(spec, key))),
            f"--time={spec.time}", f"--signal=B:TERM@{spec.notice_s}", "--requeue", "--open-mode=append",
            f"--output={spec.folder}/{name}/out.log", f"--export={','.join(names)}" if names else "--export=NIL",
            *spec.options,
        ]  # fmt: skip

    def _of_a_node(self) -> list[str]:
        """What an allocation has of each node, and a step too: without a word it gets one core."""
        gpus = [f"--gpus-per-node={self.spec.gpus_per_node}"] if self.spec.gpus_per_node else []
        return [f"--cpus-per-task={self.spec.cpus_per_node or self.spec.workers_per_node}", *gpus]

    def _start_ray(self) -> list[str]:
        """Lines that start a Ray on all nodes of the allocation, whose address they leave in $address:$port."""
        spec = self.spec
        start = f"ray start --num-cpus={spec.workers_per_node} --num-gpus={spec.gpus_per_node} --disable-usage-stats"
        no_ports = " ".join(f"{name}={value}" for name, value in NO_METRICS_PORTS.items())
        return [
            "(umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > ../token)",
            'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$(realpath ../token)" RAY_USAGE_STATS_ENABLED=0',
            f"export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 {no_ports}",
            # One name on all nodes, which nobody can guess. Ray opens its own folder to everyone; the one around it is
            # ours alone.
            'temporary="/tmp/muster-$(sha256sum < ../token | cut -c1-16)"',
            f"port=$(({_PORTS[0]} + SLURM_JOB_ID % {_PORTS[1]})); others=$((SLURM_NNODES - 1))",
            'address="$(hostname -I | cut -d" " -f1)"; address="${address:-127.0.0.1}"',
            f'step() {{ srun --overlap --export=ALL --ntasks-per-node=1 {" ".join(self._of_a_node())} "$@"; }}',
            'step --nodes=$SLURM_NNODES --ntasks=$SLURM_NNODES mkdir -m 700 "$temporary" || exit 1',
            f'step --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" {start} --block --head \\',
            '  --include-dashboard=false --node-ip-address="$address" --port=$port --temp-dir="$temporary/r" \\',
            "  > ../ray.log 2>&1 &",
            "until grep -q -s -e --block ../ray.log; do kill -0 $! || { tail ../ray.log; exit 1; }; sleep 0.5; done",
            "if [ $others -gt 0 ]; then",
            f'  step --nodes=$others --ntasks=$others --exclude="$SLURMD_NODENAME" {start} --block \\',
            '    --address="$address:$port" --temp-dir="$temporary/r" >> ../ray.log 2>&1 &',
            "fi",
        ]


def _run_job(words: Sequence[str]) -> list[str]:
    """Lines that run the job on that Ray, pass SIGTERM on, and end what was started."""
    job = shlex.join(["python", "-P", "-u", "-m", "launcher.cli.cluster_entrypoint", *words])
    return [
        f'RAY_ADDRESS="$address:$port" {job} &',
        "job=$!",
        "trap 'kill -TERM $job' TERM",
        "wait $job; status=$?",
        "while kill -0 $job 2> /dev/null; do wait $job; status=$?; done",
        "kill $(jobs -p) 2> /dev/null; wait",
        'step --nodes=$SLURM_NNODES --ntasks=$SLURM_NNODES rm -rf "$temporary"',
        "# 75: nothing is wrong with the job, but its machines are taken back",
        'if [ $status = 75 ] && [ ! -e ../stop ] && scontrol requeue "$SLURM_JOB_ID"; then sleep 60',
        "else echo $status > ../status; fi",
        "exit $status",
    ]


PROVIDER = SlurmProvider
