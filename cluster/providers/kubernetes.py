"""A RayCluster of KubeRay, managed with kubectl and reached through a port-forward that each command opens."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import yaml

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError
from cluster.providers import NO_METRICS_PORTS, Finding, Say, environment
from cluster.ray_node import of_type, price_label
from cluster.registry import ClusterRecord
from cluster.remote_shell import HERE
from cluster.spec import Kubernetes, PodPool
from cluster.tunnel import refuse_strangers_port

_UP_S, _DOWN_S, _FORWARD_S = 900.0, 300.0, 30.0
_FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class KubernetesProvider:
    def __init__(self, spec: Kubernetes):
        self.spec = spec

    def render(self) -> str:
        return yaml.dump(self._cluster(), Dumper=_Plain, sort_keys=False)

    def up(self, home: ClusterRecord, say: Say) -> None:
        say(f"applying the RayCluster {self.spec.name} in {self.spec.namespace}")
        self._kubectl("create", "secret", "generic", self._secret, f"--from-file=auth_token={home.token_file}")
        self._kubectl("apply", "-f", "-", given=self.render())
        say("waiting for its head")
        pods = f"ray.io/cluster={self.spec.name},ray.io/node-type=head"
        # The operator needs a moment before there is a pod to wait for.
        found = f"until {self._command('get', 'pod', '-l', pods, '-o', 'name')} | grep -q .; do sleep 1; done"
        HERE.run(found, timeout_s=_UP_S)
        ready = ("--for=condition=Ready", "pod", "-l", pods, f"--timeout={_UP_S:.0f}s")
        self._kubectl("wait", *ready, timeout_s=_UP_S + 10)

    def down(self, home: ClusterRecord, say: Say) -> None:
        say(f"deleting the RayCluster {self.spec.name} in {self.spec.namespace}")
        for kind, name in (("raycluster", self.spec.name), ("secret", self._secret)):
            self._kubectl("delete", kind, name, "--ignore-not-found", timeout_s=_DOWN_S)

    @contextmanager
    def connection(self, home: ClusterRecord | None) -> Iterator[Dashboard]:
        assert home is not None, "a cluster that Muster made has a record"
        with self._forward(8265) as port:
            yield Dashboard(f"http://127.0.0.1:{port}", home.token(), f"the cluster {home.name}")

    def doctor(self) -> list[Finding]:
        checks = {
            "the Kubernetes API": (("version", "-o", "json"), "check the context and the credentials of kubectl"),
            "KubeRay": (("get", "crd", "rayclusters.ray.io"), "install the KubeRay operator, 1.5 or newer"),
            "the right to make RayClusters": (
                ("auth", "can-i", "create", "rayclusters.ray.io"),
                "request this permission for the namespace",
            ),
            "the right to make secrets": (
                ("auth", "can-i", "create", "secrets"),
                "request this permission: a secret stores the token",
            ),
            "the right to forward ports": (
                ("auth", "can-i", "create", "pods/portforward"),
                "request this permission: jobs are submitted through a forwarded port",
            ),
        }
        findings: list[Finding] = []
        for what, (words, advice) in checks.items():
            findings.append(self._finding(what, words, advice))
            if not findings[0].well:
                break  # without the API the rest cannot be seen
        return findings

    def _finding(self, what: str, words: tuple[str, ...], advice: str) -> Finding:
        try:
            self._kubectl(*words)
        except ClusterError as error:
            return Finding(what, False, str(error), advice)
        return Finding(what, True, "is there")

    # kubectl

    @property
    def _secret(self) -> str:
        return f"{self.spec.name}-token"

    def _command(self, *words: str) -> str:
        context = ["--context", self.spec.context] if self.spec.context else []
        return shlex.join(["kubectl", *context, "--namespace", self.spec.namespace, *words])

    def _kubectl(self, *words: str, given: str = "", timeout_s: float = 60.0) -> str:
        return HERE.run(self._command(*words), given=given, timeout_s=timeout_s)

    @contextmanager
    def _forward(self, port: int) -> Iterator[int]:
        command = self._command("port-forward", f"service/{self.spec.name}-head-svc", f":{port}")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True
        )  # fmt: skip
        assert process.stdout is not None
        overdue = threading.Timer(_FORWARD_S, process.kill)
        overdue.start()
        try:
            said = _FORWARDING.search(process.stdout.readline())
            overdue.cancel()
            if said is None:
                process.kill()
                raise ClusterError(
                    f"cannot connect to the cluster {self.spec.name}: {process.communicate()[1].strip()}"
                )
            refuse_strangers_port(int(said[1]), f"the cluster {self.spec.name}")
            yield int(said[1])
        finally:
            overdue.cancel()
            process.kill()
            process.communicate()

    # The RayCluster

    def _cluster(self) -> dict[str, Any]:
        spec = self.spec
        head = {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "127.0.0.1"}
        resources = {"cpu": str(spec.head.cpus), "memory": f"{spec.head.memory_gib}Gi"}
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {
                "name": spec.name,
                "namespace": spec.namespace,
                "labels": {"app.kubernetes.io/managed-by": "muster"},
            },
            "spec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token", "secretName": self._secret},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {
                    "version": "v2",
                    "idleTimeoutSeconds": 60 * spec.idle_minutes,
                    "env": _variables(NO_METRICS_PORTS),
                },
                "headGroupSpec": {
                    "serviceType": "ClusterIP",
                    **_labels(price_label(spec.head.price)),
                    "rayStartParams": head,
                    "template": self._pod("ray-head", spec.image, resources, spec.head.node_selector, [], 1),
                },
                "workerGroupSpecs": [self._group(name, pool) for name, pool in spec.pools.items()],
            },
        }

    def _group(self, name: str, pool: PodPool) -> dict[str, Any]:
        resources = {"cpu": str(pool.cpus), "memory": f"{pool.memory_gib}Gi"}
        if pool.gpus:
            resources[pool.gpu_resource] = str(pool.gpus)
        image = pool.image or self.spec.image
        parameters = {"num-gpus": str(pool.gpus)}
        if pool.gpu:
            parameters["resources"] = json.dumps(json.dumps(of_type(pool.gpu)))  # KubeRay puts it into a command line
        return {
            "groupName": name,
            **_labels(pool.labels | price_label(pool.price)),
            "replicas": pool.min,
            "minReplicas": pool.min,
            "maxReplicas": pool.max,
            "rayStartParams": parameters,
            "template": self._pod(
                "ray-worker", image, resources, pool.node_selector, pool.tolerations, pool.shared_memory_gib
            ),
        }

    def _pod(
        self, name: str, image: str, resources: dict[str, str], selector: dict[str, str],
        tolerations: list[dict[str, Any]], shm: int
    ) -> dict[str, Any]:  # fmt: skip
        variables = {"RAY_USAGE_STATS_ENABLED": "0", **environment(self.spec)}
        pod: dict[str, Any] = {
            "containers": [
                {
                    "name": name,
                    "image": image,
                    "env": _variables(variables),
                    "resources": {"requests": resources, "limits": resources},
                    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
                }
            ],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm}Gi"}}],
        }
        if self.spec.service_account:
            pod["serviceAccountName"] = self.spec.service_account
        if selector:
            pod["nodeSelector"] = selector
        if tolerations:
            pod["tolerations"] = tolerations
        return {"spec": pod}


def _variables(variables: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": key, "value": value} for key, value in variables.items()]


def _labels(labels: dict[str, str]) -> dict[str, Any]:
    return {"labels": labels} if labels else {}


PROVIDER = KubernetesProvider
