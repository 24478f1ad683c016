"""Standard output and standard error that cannot end a command: a closed terminal, a reader that is gone, a full disk.

What cannot be written is dropped. A terminal or a pipe that has failed once is never read again: what comes later goes
to /dev/null. To a file it is tried on: its disk may have room again.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_MISSING = "[some output is missing here: it could not be written]\n"


class Output:
    """A text stream whose failures end nothing. `failed` is called with the first of them."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None] = lambda error: None):
        self._stream, self._failed = stream, failed
        self._has_failed = self._fails = self._is_missing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._fails and self._attempt(self._stream.flush) and self._is_missing:
            self._is_missing = not self._attempt(lambda: self._stream.write(_MISSING))
        if self._fails or not self._attempt(lambda: self._stream.write(text)):
            self._is_missing = True
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except OSError as error:
            self._fails = True
            if not _is_file(self._stream):
                _to_nowhere(self._stream)
            if not self._has_failed:
                self._has_failed = True
                self._failed(error)
            return False
        self._fails = False
        return True


class Outputs:
    """Both streams, and what failed of them."""

    def __init__(self) -> None:
        self._failures: list[tuple[str, str]] = []
        self._report: Callable[[str, str], None] | None = None

    def report_to(self, report: Callable[[str, str], None]) -> None:
        """Call `report` with the name of each stream that has failed or will fail, and why."""
        self._report = report
        for failure in self._failures:
            report(*failure)

    def guarded(self, name: str, stream: TextIO | None) -> Any:
        """A stream to use in place of this one; None is one that was closed before we began."""
        return Output(stream or open(os.devnull, "w"), lambda error: self._note(name, error))

    def _note(self, name: str, error: OSError) -> None:
        self._failures.append((name, str(error)))
        if self._report is not None:
            self._report(name, str(error))


@contextmanager
def kept_going() -> Iterator[Outputs]:
    """In the block sys.stdout and sys.stderr drop what they cannot write.
    For work that is worth more than what it prints."""
    before = sys.stdout, sys.stderr
    outputs = Outputs()
    sys.stdout, sys.stderr = outputs.guarded("stdout", sys.stdout), outputs.guarded("stderr", sys.stderr)
    try:
        yield outputs
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def flush() -> None:
    """Write what is buffered, or drop it: the end of the process must not fail with it, and change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            _to_nowhere(stream)
            with suppress(OSError):
                stream.flush()


def _is_file(stream: Any) -> bool:
    with suppress(OSError, ValueError):
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    return False


def _to_nowhere(stream: Any) -> None:
    """What is in the buffer of a stream, and what comes later, goes to /dev/null."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
