"""Entry point of the `muster` command: it takes signals before anything that takes time is imported."""

from __future__ import annotations

import atexit
import os

from launcher.driver import signals
from launcher.process.exit_status import ExitStatus


def main() -> None:
    signals.exit_on_signals()
    from launcher.cli.common import fail
    from launcher.cli.main import app
    from launcher.process import output

    try:
        app()
    except OSError as error:  # from what is printed outside of a verb, such as its help
        fail(error, ExitStatus.FAILED)
    except SystemExit as end:
        output.flush()
        if end.code in (ExitStatus.TRY_AGAIN, ExitStatus.INTERRUPTED):
            _leave(end.code)
        raise


def _leave(status: int) -> None:
    """End the process although threads are at work: Python's own end would stop them in the middle of C++ code,
    which aborts the process."""
    atexit._run_exitfuncs()
    os._exit(status)


if __name__ == "__main__":
    main()
