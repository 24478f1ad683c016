"""EC2 as far as its API goes (moto's server), and what gives its instances a body: run on the machine that has the API.

Writes what there is into a file OUT again and again; `tests/multihost/test_aws.py` turns it into machines, and says by
a file OUT.off.ID that the system of one has shut itself down.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def instances(ec2: Any) -> list[dict[str, Any]]:
    found = [one for group in ec2.describe_instances()["Reservations"] for one in group["Instances"]]
    return [
        {
            "id": one["InstanceId"],
            "type": one["InstanceType"],
            "state": one["State"]["Name"],
            "address": one.get("PrivateIpAddress"),
            "spot": one.get("InstanceLifecycle") == "spot",
            "user_data": _user_data(ec2, one["InstanceId"]),
            "tags": {tag["Key"]: tag["Value"] for tag in one.get("Tags", [])},
        }
        for one in found
    ]


def _user_data(ec2: Any, instance: str) -> str:
    answer = ec2.describe_instance_attribute(InstanceId=instance, Attribute="userData")
    return base64.b64decode(answer["UserData"].get("Value", "")).decode()


def shut_down(ec2: Any, instance: str) -> None:
    """What EC2 does with an instance whose system has shut itself down."""
    name = "instanceInitiatedShutdownBehavior"
    answer = ec2.describe_instance_attribute(InstanceId=instance, Attribute=name)
    behavior = answer["InstanceInitiatedShutdownBehavior"]["Value"]
    {"terminate": ec2.terminate_instances, "stop": ec2.stop_instances}[behavior](InstanceIds=[instance])


def main(address: str, port: str, out: str) -> None:
    import boto3
    from moto.ec2.exceptions import EC2ClientError
    from moto.ec2.responses.instances import InstanceResponse
    from moto.server import ThreadedMotoServer

    asked = InstanceResponse._get_param
    # Of MinCount to MaxCount instances AWS starts as many as there are to be had, moto as few as may be.
    InstanceResponse._get_param = lambda self, name, *rest, **named: asked(  # type: ignore[method-assign]
        self, {"MinCount": "MaxCount"}.get(name, name), *rest, **named
    )
    given = InstanceResponse.run_instances

    def run_instances(self: Any) -> Any:
        if Path(f"{out}.no-spot").exists() and self._get_param("InstanceMarketOptions.MarketType") == "spot":
            raise EC2ClientError(
                "InsufficientInstanceCapacity", "There is no Spot capacity available that matches your request."
            )
        return given(self)

    InstanceResponse.run_instances = run_instances  # type: ignore[method-assign]
    ThreadedMotoServer(address, int(port), verbose=False).start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{address}:{port}"
    boto3.client("iam").create_instance_profile(InstanceProfileName="trainer")
    ec2 = boto3.client("ec2")
    while True:
        for off in Path(out).parent.glob(f"{Path(out).name}.off.*"):
            shut_down(ec2, off.suffix[1:])
            off.unlink()
        groups = ec2.describe_security_groups()["SecurityGroups"]
        rules = {group["GroupName"]: group["IpPermissions"] for group in groups}
        draft = Path(f"{out}.new")
        draft.write_text(json.dumps({"instances": instances(ec2), "groups": rules}))
        draft.replace(out)
        time.sleep(0.3)


if __name__ == "__main__":
    main(*sys.argv[1:])
