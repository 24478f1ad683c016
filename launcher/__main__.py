"""Entry point of the `muster` command: it takes signals before anything that takes time is imported."""

from __future__ import annotations

from launcher import interrupts


def main() -> None:
    interrupts.exit_on_signals()
    from launcher import output
    from launcher.cli import app

    try:
        app()
    finally:
        output.flush()


if __name__ == "__main__":
    main()
