"""Errors of clusters, with messages for the user."""

from __future__ import annotations


class ClusterError(Exception):
    """A machine, a provider or a cluster failed. The message says which, why, and what to do."""


class Refused(ClusterError):
    """The request is invalid. Nothing was started."""
