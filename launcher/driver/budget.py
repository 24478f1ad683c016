"""Limits of a run over all its attempts: hours with workers, and the cost of their machines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from launcher.runfolder.small_files import SmallFiles
from training.errors import InputError

SPENT = "spent.json"
_EVERY_S = 15.0
"""At most so much is forgotten when the driver is killed."""
_HOUR_S = 3600.0


class Budget:
    """Counts while workers are held. What was counted is kept in the run's folder."""

    def __init__(
        self,
        folder: Path,
        max_hours: float | None,
        max_cost: float | None,
        clock: Callable[[], float] = time.monotonic,
        files: SmallFiles | None = None,
    ):
        self._files = files or SmallFiles()
        self._file, self.max_hours, self.max_cost, self._clock = folder / SPENT, max_hours, max_cost, clock
        spent = json.loads(self._file.read_text()) if self._file.exists() else {"hours": 0.0, "cost": 0.0}
        self.hours: float = spent["hours"]
        self.cost: float = spent["cost"]
        self._price = 0.0
        self._counted_at: float | None = None
        self._written_at = clock()

    def begin(self, price: float | None) -> None:
        """Workers are held from now on. `price`: of their machines, an hour.
        Raises InputError if it is needed and not known."""
        if price is None and self.max_cost is not None:
            raise InputError.of(
                "max_cost",
                "not every machine says what it costs; set `price` in the cluster file, or max_hours instead",
            )
        self._price, self._counted_at = price or 0.0, self._clock()

    def count(self) -> None:
        """Up to now. Does nothing while no workers are held."""
        if self._counted_at is None:
            return
        now = self._clock()
        hours = (now - self._counted_at) / _HOUR_S
        self.hours, self.cost, self._counted_at = self.hours + hours, self.cost + hours * self._price, now
        if now - self._written_at >= _EVERY_S:
            self._write()

    def end(self) -> None:
        """The workers are let go."""
        self.count()
        if self._counted_at is not None:
            self._counted_at = None
            self._write()

    def _write(self) -> None:
        self._written_at = self._clock()
        self._files.replace(self._file, json.dumps({"hours": self.hours, "cost": self.cost}))

    @property
    def reached(self) -> str | None:
        """The limit that has been reached, in words."""
        if self.max_hours is not None and self.hours >= self.max_hours:
            return f"max_hours is {self.max_hours:g}, the run has had workers for {self.hours:.2f} hours"
        if self.max_cost is not None and self.cost >= self.max_cost:
            return f"max_cost is {self.max_cost:g}, the run has cost {self.cost:.2f}"
        return None
