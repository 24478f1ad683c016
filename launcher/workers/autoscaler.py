"""The autoscaler's report about a waiting gang: pending machines, refused machines, and infeasible requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.workers import ray_compat

_ANSWER_S = 10.0
_LONGEST_REASON = 160
"""Characters of a cloud's message."""
_UNKNOWN = "see monitor.log on the head"
"""Ray's autoscaler does not always pass the reason on."""


@dataclass(frozen=True)
class Outlook:
    """The state at the autoscaler's last round, which it makes every five seconds."""

    coming: Mapping[str, int]
    """Pending machines, by pool."""
    refused: tuple[str, ...] = ()
    """The provider's messages about refused machines."""
    impossible: bool = False
    """The request does not fit even if the autoscaler starts all machines that it may start."""

    def __str__(self) -> str:
        coming = ", ".join(f"{count} {pool}" for pool, count in self.coming.items())
        return "; ".join([f"pending: {coming or 'none'}", *self.refused])


def outlook(gang: str, since: float) -> Outlook | None:
    """`gang`: id of its placement group, in hexadecimal digits. Refusals before `since` (Unix time, s) are left out.

    Returns None if no autoscaler reports (only its version 2 does).
    """
    said = ray_compat.autoscaling_state(timeout_s=_ANSWER_S)
    if said is None:
        return None
    coming = Counter[str]()
    for request in said.pending_instance_requests:
        coming[request.ray_node_type_name] += request.count
    for machine in said.pending_instances:
        coming[machine.ray_node_type_name] += 1
    refused = {
        f"{failed.ray_node_type_name} was refused: {' '.join(failed.reason.split())[:_LONGEST_REASON] or _UNKNOWN}"
        for failed in said.failed_instance_requests
        if failed.failed_ts >= since
    }
    impossible = any(request.details.startswith(gang) for request in said.infeasible_gang_resource_requests)
    return Outlook(coming, tuple(sorted(refused)), impossible)
