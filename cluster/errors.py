"""What a person is told when a cluster cannot do what was asked."""

from __future__ import annotations


class ClusterError(Exception):
    """A machine, a provider or a cluster does not do what it should. The text says which, what and what to do."""


class Refused(ClusterError):
    """What was asked cannot work as it was given: nothing was started."""
