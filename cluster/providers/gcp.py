"""Compute Engine: the configuration for Ray's launcher, and checks of the prerequisites."""

from __future__ import annotations

from typing import Any, ClassVar

from cluster.providers import Finding
from cluster.providers.cloud import CloudProvider
from cluster.spec import CloudHead, CloudPool, Gcp

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class GcpProvider(CloudProvider[Gcp]):
    packages: ClassVar = {
        "googleapiclient": "google-api-python-client",
        "google.auth": "google-auth",
        "cryptography": "cryptography",
    }

    def where(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "region": spec.region,
            "availability_zone": spec.zone,
            "project_id": spec.project,
            "use_internal_ips": spec.private,
        }

    def machine(self, kind: CloudHead | CloudPool, *, spot: bool, public_key: str) -> dict[str, Any]:
        spec = self.spec
        start: dict[str, Any] = {"diskSizeGb": kind.disk_gib}
        if image := kind.image or spec.image:
            start["sourceImage"] = image
        config: dict[str, Any] = {
            "machineType": kind.instance,
            "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": start}],
            "metadata": {"items": [{"key": "ssh-keys", "value": f"{spec.user}:{public_key}"}]},
        }
        if spec.service_account:
            config["serviceAccounts"] = [{"email": spec.service_account, "scopes": [_SCOPE]}]
        scheduling: list[dict[str, Any]] = [{"preemptible": True}] if spot else []
        if isinstance(kind, CloudPool) and kind.gpus:
            scheduling.append({"onHostMaintenance": "TERMINATE"})  # machines with GPUs cannot be moved
        return config | ({"scheduling": scheduling} if scheduling else {})

    def stopped(self, nodes: Any) -> list[str]:
        return [node["name"] for kind in nodes.resources.values() for node in kind.list_instances({}, True)]

    def account(self) -> list[Finding]:
        import google.auth
        from google.auth.exceptions import GoogleAuthError

        try:
            _, project = google.auth.default(scopes=[_SCOPE])
        except GoogleAuthError as error:
            return [Finding("Google credentials", False, str(error), "run `gcloud auth application-default login`")]
        return [Finding("Google credentials", True, f"there are some, of project {project or 'not said'}")]


PROVIDER = GcpProvider
