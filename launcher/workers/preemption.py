"""Spot notices: polls the metadata service of the machine's cloud for a coming preemption.

| cloud | request | notice |
|---|---|---|
| AWS | `/latest/meta-data/spot/instance-action` (with an IMDSv2 token) | 200 instead of 404; two minutes before |
| GCP | `/computeMetadata/v1/instance/preempted` | `TRUE`; half a minute before |
| Azure | `/metadata/scheduledevents?api-version=2020-07-01` | an event of type Preempt; half a minute before |

The firmware tells which cloud it is (`/sys/class/dmi/id/sys_vendor`); other machines send no requests.
`MUSTER_METADATA_URL` sets another endpoint and `MUSTER_CLOUD` another cloud: aws, gcp, azure, or none.
"""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

from training.io import foreign_files
from training.io.http_requests import RequestError, StatusError, fetch

_VENDORS = {"Amazon EC2": "aws", "Google": "gcp", "Microsoft Corporation": "azure"}
_ADDRESSES = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
_TIMEOUT_S = 2.0
_EVERY_S = 5.0
"""Short enough for GCP and Azure, which give a notice of half a minute."""


def cloud() -> str | None:
    """Return aws, gcp or azure; None on other machines."""
    if (named := os.environ.get("MUSTER_CLOUD")) is not None:
        return named if named in _ADDRESSES else None
    try:
        return _VENDORS.get(Path("/sys/class/dmi/id/sys_vendor").read_text().strip())
    except OSError:
        return None


def notice(cloud: str) -> str | None:
    """Return the cloud's preemption notice for this machine, None if there is none."""
    address = os.environ.get("MUSTER_METADATA_URL", _ADDRESSES[cloud]).rstrip("/")
    try:
        with foreign_files.made_sense_of(RequestError):
            return _ASK[cloud](address)
    except RequestError:  # no answer is no notice
        return None


def _aws(address: str) -> str | None:
    token = _get(f"{address}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    try:
        said = _get(f"{address}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except StatusError:  # 404: none
        return None
    action = foreign_files.loads(said)
    return f"AWS will {action['action']} it at {action['time']}"


def _gcp(address: str) -> str | None:
    said = _get(f"{address}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "GCP preempts it" if said.strip() == "TRUE" else None


def _azure(address: str) -> str | None:
    said = _get(f"{address}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    events = [event for event in foreign_files.loads(said)["Events"] if event["EventType"] == "Preempt"]
    return f"Azure preempts it at {events[0]['NotBefore'] or 'once'}" if events else None


_ASK: dict[str, Callable[[str], str | None]] = {"aws": _aws, "gcp": _gcp, "azure": _azure}


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    # Metadata are never behind a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return fetch(urllib.request.Request(url, headers=headers, method=method), _TIMEOUT_S, opener).decode()


class Listener:
    """Polls for a notice in a daemon thread. `said` is the notice, once there is one."""

    def __init__(self) -> None:
        self.said: str | None = None
        if (where := cloud()) is not None:
            threading.Thread(target=self._listen, args=(where,), name="notices", daemon=True).start()

    def _listen(self, where: str) -> None:
        pause = threading.Event()
        while self.said is None:
            self.said = notice(where)
            pause.wait(_EVERY_S)
