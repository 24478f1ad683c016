"""Azure: what Ray's launcher is told of it, and what keeps it from working."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from cluster.providers import Finding
from cluster.providers.cloud import CloudProvider
from cluster.spec import Azure, CloudHead, CloudPool

_SCOPE = "https://management.azure.com/.default"
METADATA, MANAGEMENT = "http://169.254.169.254/metadata", "https://management.azure.com"
DEALLOCATE = f"""set -e -o pipefail
ask() {{ curl -sSf -m 30 --noproxy "*" -H Metadata:true "{METADATA}/$1"; }}
answer="$(ask "identity/oauth2/token?api-version=2018-02-01&resource={MANAGEMENT}/")"
token="$(printf %s "$answer" | python3 -c 'import json, sys; print(json.load(sys.stdin)["access_token"])')"
machine="$(ask "instance/compute/resourceId?api-version=2021-02-01&format=text")"
printf 'header = "Authorization: Bearer %s"' "$token" |
  curl -sSf -m 60 -K - -X POST -d "" "{MANAGEMENT}$machine/deallocate?api-version=2024-07-01"
"""
"""Bash for a machine of Azure that gives itself back; its disk stays."""
_IMAGE = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")


class AzureProvider(CloudProvider[Azure]):
    packages: ClassVar = {
        "azure.identity": "azure-identity", "azure.mgmt.compute": "azure-mgmt-compute",
        "azure.mgmt.network": "azure-mgmt-network",
        "azure.mgmt.resource": "azure-mgmt-resource", "azure.common": "azure-common", "msrestazure": "msrestazure",
    }  # fmt: skip

    def where(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "location": spec.region,
            "resource_group": spec.resource_group,
            "subscription_id": spec.subscription,
            "use_internal_ips": spec.private,
            # Else Ray would keep their disks when machines go.
            "cache_stopped_nodes": False,
        }

    def keys(self, folder: Path) -> dict[str, str]:
        return {"ssh_private_key": str(folder / "key"), "ssh_public_key": str(folder / "key.pub")}

    def machine(self, kind: CloudHead | CloudPool, *, spot: bool, public_key: str) -> dict[str, Any]:
        parameters: dict[str, Any] = {"vmSize": kind.instance, "osDiskSize": kind.disk_gib}
        if image := kind.image or self.spec.image:
            parameters |= dict(zip(_IMAGE, image.split(":"), strict=True))
        return {"azure_arm_parameters": parameters | ({"priority": "Spot"} if spot else {})}

    def stopped(self, nodes: Any) -> list[str]:
        ids: list[str] = nodes.stopped_nodes({})
        return ids

    def end_command(self) -> list[str]:
        """A machine that only shuts down is paid for: Azure has to be told,
        as the identity that Ray gives its machines."""
        return ["bash", "-c", DEALLOCATE]

    def account(self) -> list[Finding]:
        from azure.core.exceptions import AzureError
        from azure.identity import AzureCliCredential

        try:
            AzureCliCredential().get_token(_SCOPE)
        except AzureError as error:
            return [Finding("Azure credentials", False, str(error).splitlines()[0], "run `az login`")]
        return [Finding("Azure credentials", True, "there are some")]


PROVIDER = AzureProvider
