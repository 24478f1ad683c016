"""Workers that compute more slowly than the others, and so hold all of them up. Pure: paces in, names out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

_SLOW = 1.5
"""Times the median of the workers."""
_LOOKS = 5
"""A worker is slow when it was in so many looks in a row: one slow step is nothing."""


class Stragglers:
    """Remembers the last looks."""

    def __init__(self) -> None:
        self._looks: deque[set[int]] = deque(maxlen=_LOOKS)
        self._known: set[int] = set()

    def look(self, paces: Sequence[float]) -> dict[int, float]:
        """Workers that have turned out slow, with how many times the median they take.

        `paces`: what each worker needed for its own part of the work [s a token], without waiting for others.
        """
        usual = median(paces)
        if usual <= 0 or len(paces) < 2:
            return {}
        self._looks.append({rank for rank, pace in enumerate(paces) if pace > _SLOW * usual})
        always = set.intersection(*self._looks) if len(self._looks) == _LOOKS else set()
        found = always - self._known
        self._known |= found
        return {rank: paces[rank] / usual for rank in sorted(found)}
