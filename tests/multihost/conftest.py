"""A cluster of four machines, and runs whose driver is on the first of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multihost import lab as labs
from tests.multihost.lab import Lab
from tests.support import disturbed

DRIVER, WORKING = "a", "bcd"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A machine for the driver, and three with a place for one worker each."""
    with Lab(DRIVER + WORKING) as lab:
        lab.start_ray(DRIVER, cpus=1)
        yield lab


class LabRun(disturbed.Run):
    """`muster run` on the driver's machine."""

    def __init__(self, lab: Lab, tiny: Path, folder: Path):
        super().__init__(tiny, folder)
        self.lab = lab

    def popen(self, command: list[str]) -> subprocess.Popen:
        return self.lab[DRIVER].run(*command, log=self.log, RAY_ADDRESS=self.lab.address, **self.environment)

    def machine_of(self, rank: int) -> str:
        """Name of the machine of a worker."""
        address = self.worker(rank)["machine"]
        return next(name for name, machine in self.lab.machines.items() if machine.address == address)

    def close(self) -> None:
        if self.process.poll() is None:
            self.lab[DRIVER].run("pkill", "-9", "-f", "m launcher ", log=self.log).wait(60)
            self.process.wait(60)


@pytest.fixture
def run(lab, tiny, tmp_path) -> Iterator[LabRun]:
    run = LabRun(lab, tiny, tmp_path)
    yield run
    run.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if (why := labs.why_not()) is not None:
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=why))
