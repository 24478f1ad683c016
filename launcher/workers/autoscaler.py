"""What the autoscaler of a cluster says of a gang that waits: what is coming,
what did not come, whether it ever can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.workers import ray_compat

_ANSWER_S = 10.0
_LONGEST_REASON = 160
"""Characters of what a cloud says."""
_UNKNOWN = "the head's monitor.log says why"
"""Ray's autoscaler does not always pass it on."""


@dataclass(frozen=True)
class Outlook:
    """As of the autoscaler's last round; it makes one every five seconds."""

    coming: Mapping[str, int]
    """Machines that are on their way, by pool."""
    refused: tuple[str, ...] = ()
    """What the provider said of machines that it did not give."""
    impossible: bool = False
    """All machines that it may start, beside those that are up and in use, would not be enough."""

    def __str__(self) -> str:
        coming = ", ".join(f"{count} {pool}" for pool, count in self.coming.items())
        return "; ".join([f"coming: {coming or 'none'}", *self.refused])


def outlook(gang: str, since: float) -> Outlook | None:
    """`gang`: id of its placement group, in hexadecimal digits. Refusals before `since` (Unix, s) are not told again.

    None where no autoscaler reports (that is its version 2).
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
        f"{failed.ray_node_type_name} was not given: {' '.join(failed.reason.split())[:_LONGEST_REASON] or _UNKNOWN}"
        for failed in said.failed_instance_requests
        if failed.failed_ts >= since
    }
    impossible = any(request.details.startswith(gang) for request in said.infeasible_gang_resource_requests)
    return Outlook(coming, tuple(sorted(refused)), impossible)
