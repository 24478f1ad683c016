"""Finds stragglers: workers that compute more slowly than the others, which wait for them. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

_SLOW = 1.5
"""Multiple of the median above which a worker counts as slow."""
_LOOKS = 5
"""Number of consecutive slow looks that make a worker a straggler: one slow step does not."""


class Stragglers:
    """Remembers which workers were slow in the last looks."""

    def __init__(self) -> None:
        self._looks: deque[set[int]] = deque(maxlen=_LOOKS)
        self._known: set[int] = set()

    def look(self, paces: Sequence[float]) -> dict[int, float]:
        """Return new stragglers, with their time as a multiple of the median.

        `paces`: time of each worker for its own part of the work [s per token], without waiting for others.
        """
        usual = median(paces)
        if usual <= 0 or len(paces) < 2:
            return {}
        self._looks.append({rank for rank, pace in enumerate(paces) if pace > _SLOW * usual})
        always = set.intersection(*self._looks) if len(self._looks) == _LOOKS else set()
        found = always - self._known
        self._known |= found
        return {rank: paces[rank] / usual for rank in sorted(found)}
