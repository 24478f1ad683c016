"""A connection to a Ray cluster: the address of its dashboard as seen from here, and its token."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError, Refused

_ANSWER_S = 20.0
_NO_ANSWER = (OSError, ValueError, http.client.HTTPException, RecursionError, OverflowError, MemoryError)
"""The exceptions of Python's HTTP client and JSON for truncated and invalid replies."""


@dataclass(frozen=True)
class Dashboard:
    """The dashboard of a cluster, which accepts jobs."""

    url: str
    """Of this moment: perhaps the end of a tunnel."""
    token: str | None
    shown: str
    """What a person calls it."""

    def __post_init__(self) -> None:
        """What is on this machine is not asked for through a proxy, which would be told the token."""
        direct = [name for name in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if name]
        if "//127.0.0.1:" in self.url and "127.0.0.1" not in direct:
            os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join([*direct, "127.0.0.1"])

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def get(self, path: str) -> Any:
        """A JSON answer. Raises Refused for a missing or wrong token, ClusterError if there is no answer."""
        request = urllib.request.Request(f"{self.url}{path}")
        for name, value in self.headers.items():  # for this address alone: not for where a redirect leads
            request.add_unredirected_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise Refused(self._told_of_token(error.code)) from None
            raise ClusterError(
                f"{self.shown} answers {error.code} to {path}; is it a Ray cluster's dashboard?"
            ) from None
        except _NO_ANSWER as error:
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"{self.shown} does not answer at {self.url}: {reason}; check that the cluster is running"
            ) from None

    def _told_of_token(self, code: int) -> str:
        if self.token is None:
            return (
                f"{self.shown} requires a token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or `token_file` in the "
                "cluster file"
            )
        return f"{self.shown} rejects the token ({code}); check that it is the token of this cluster"

    def version(self) -> str:
        """Of Ray there."""
        path = "/api/version"
        with self._form_of(path):
            return str(self.get(path)["ray_version"])

    def nodes(self) -> list[dict[str, Any]]:
        """The machines that are up: address, whether it is the head, CPUs, GPUs, labels."""
        path = "/api/v0/nodes?limit=10000&detail=True"
        with self._form_of(path):
            return [
                {
                    "address": node["node_ip"],
                    "head": node["is_head_node"],
                    "cpus": node["resources_total"].get("CPU", 0),
                    "gpus": node["resources_total"].get("GPU", 0),
                    "labels": node.get("labels") or {},
                }
                for node in self.get(path)["data"]["result"]["result"]
                if node["state"] == "ALIVE"
            ]

    @contextmanager
    def _form_of(self, path: str) -> Iterator[None]:
        """Raise ClusterError for unexpected answers within the block."""
        try:
            yield
        except (KeyError, TypeError, AttributeError):
            raise ClusterError(
                f"{self.shown} gives an unexpected answer to {path}; check that it is the dashboard of a Ray cluster"
            ) from None
