"""EC2: what Ray's launcher is told of it, and what keeps it from working."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

from cluster.errors import ClusterError
from cluster.providers import Finding, Say
from cluster.providers.cloud import CloudProvider
from cluster.spec import Aws, CloudHead, CloudPool

_CLOCK_S = 60.0
"""Requests are signed with the time; AWS refuses what is five minutes off."""
_GONE_S = 300
_QUOTAS = {"p": "Running On-Demand P instances", "g": "Running On-Demand G and VT instances"}
"""In vCPUs, by the first letter of the instance."""


class AwsProvider(CloudProvider[Aws]):
    packages: ClassVar = {"boto3": "boto3"}

    def where(self) -> dict[str, Any]:
        spec = self.spec
        where: dict[str, Any] = {"region": spec.region, "cache_stopped_nodes": False, "use_internal_ips": spec.private}
        return where | ({"availability_zone": ",".join(spec.zones)} if spec.zones else {})

    def machine(self, kind: CloudHead | CloudPool, *, spot: bool, public_key: str) -> dict[str, Any]:
        spec = self.spec
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": kind.disk_gib, "VolumeType": "gp3"}}
        config: dict[str, Any] = {
            "InstanceType": kind.instance,
            "BlockDeviceMappings": [disk],
            # By cloud-init: a key pair of EC2 would be one more thing to remove.
            "UserData": f"#cloud-config\nssh_authorized_keys: [{json.dumps(public_key)}]\n",
            "MetadataOptions": {"HttpTokens": "required"},
            # A machine that shuts itself down, for want of a head, is gone with its disk.
            "InstanceInitiatedShutdownBehavior": "terminate",
        }
        if image := kind.image or spec.image:
            config["ImageId"] = image
        if spec.instance_profile:
            config["IamInstanceProfile"] = {"Name": spec.instance_profile}
        if spec.subnets:
            config["SubnetIds"] = list(spec.subnets)
        if spec.security_groups:
            config["SecurityGroupIds"] = list(spec.security_groups)
        if spot:
            config["InstanceMarketOptions"] = {"MarketType": "spot"}
        return config

    def account(self) -> list[Finding]:
        from botocore.exceptions import BotoCoreError, ClientError

        findings: list[Finding] = []
        checks: tuple[Callable[[], Iterator[Finding]], ...] = (self._identity, self._rights, self._quotas)
        for check in checks:
            try:
                findings += check()
            except (BotoCoreError, ClientError) as error:
                advice = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
                return [*findings, Finding("AWS", False, str(error), advice)]
        return findings

    def _client(self, service: str) -> Any:
        import boto3

        return boto3.client(service, region_name=self.spec.region)

    def _identity(self) -> Iterator[Finding]:
        answer = self._client("sts").get_caller_identity()
        yield Finding("AWS credentials", True, answer["Arn"])
        if date := answer["ResponseMetadata"]["HTTPHeaders"].get("date"):
            apart = abs(time.time() - parsedate_to_datetime(date).timestamp())
            if apart > _CLOCK_S:
                yield Finding(
                    "the clock here", False, f"is {apart:.0f} s off that of AWS", "let it follow a time server"
                )

    def _rights(self) -> Iterator[Finding]:
        """EC2 says what it would do, without doing it."""
        from botocore.exceptions import ClientError

        ec2 = self._client("ec2")
        kinds: list[CloudHead | CloudPool] = [self.spec.head, *self.spec.pools.values()]
        for kind in kinds:
            image = kind.image or self.spec.image
            try:
                ec2.run_instances(
                    DryRun=True,
                    MinCount=1,
                    MaxCount=1,
                    InstanceType=kind.instance,
                    **({"ImageId": image} if image else {}),
                )
            except ClientError as error:
                code = error.response["Error"]["Code"]
                well = code == "DryRunOperation" or (image is None and code == "MissingParameter")
                said = "may be started" if well else error.response["Error"]["Message"]
                yield Finding(
                    kind.instance,
                    well,
                    said,
                    "" if well else "ask for the right, or correct instance, image and region",
                )

    def _quotas(self) -> Iterator[Finding]:
        """What is said of on-demand machines; spot machines have quotas of their own."""
        from botocore.exceptions import BotoCoreError, ClientError

        wanted: dict[str, int] = {}
        for pool in self.spec.pools.values():
            if pool.market != "spot" and (name := _QUOTAS.get(pool.instance[:1])):
                wanted[name] = wanted.get(name, 0) + pool.max * pool.cpus
        if not wanted:
            return
        try:
            pages = self._client("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="ec2")
            quotas = {quota["QuotaName"]: quota["Value"] for page in pages for quota in page["Quotas"]}
        except (BotoCoreError, ClientError) as error:
            yield Finding("quotas", True, f"cannot be seen: {error}")
            return
        for name, cpus in wanted.items():
            if (allowed := quotas.get(name)) is not None:
                advice = "" if cpus <= allowed else f"ask AWS for more in {self.spec.region}, or lower `max`"
                yield Finding(name, cpus <= allowed, f"{allowed:.0f} vCPUs allowed, the pools ask for {cpus}", advice)

    def stopped(self, nodes: Any) -> list[str]:
        return _ids(self._client("ec2"), nodes.cluster_name, "stopping", "stopped")

    def tidy(self, cluster_name: str, say: Say) -> None:
        """The security group can go when the machines are gone, which takes a minute or two."""
        from botocore.exceptions import BotoCoreError, ClientError, WaiterError

        ec2 = self._client("ec2")
        try:
            groups = ec2.describe_security_groups(Filters=_tagged(cluster_name))["SecurityGroups"]
            if not groups:
                return
            # EC2 forgets terminated machines after an hour, and the waiter never ends where there are none.
            if ending := _ids(ec2, cluster_name, "running", "shutting-down"):
                say("waiting for the machines to be gone, to remove their security group")
                ec2.get_waiter("instance_terminated").wait(
                    InstanceIds=ending, WaiterConfig={"Delay": 5, "MaxAttempts": _GONE_S // 5}
                )
            for group in groups:
                ec2.delete_security_group(GroupId=group["GroupId"])
        except (BotoCoreError, ClientError, WaiterError) as error:
            raise ClusterError(f"its security group is left: {error}") from error


def _tagged(cluster_name: str) -> list[dict[str, Any]]:
    return [{"Name": "tag:ray-cluster-name", "Values": [cluster_name]}]


def _ids(ec2: Any, cluster_name: str, *states: str) -> list[str]:
    """Of the cluster's machines in one of these states."""
    filters = [*_tagged(cluster_name), {"Name": "instance-state-name", "Values": list(states)}]
    pages = ec2.get_paginator("describe_instances").paginate(Filters=filters)
    return [one["InstanceId"] for page in pages for group in page["Reservations"] for one in group["Instances"]]


PROVIDER = AwsProvider
