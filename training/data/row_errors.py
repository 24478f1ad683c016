"""Rows and files of rows that cannot be used."""

from __future__ import annotations


class RowError(ValueError):
    """One row that cannot be used; the text says what was got, what was expected and what to do."""


class UnreadableFile(RowError):
    """The rest of a file cannot be read: no bad row, since nobody knows how many rows it had."""

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.number = number
        """The line or row, if it is not the one after the last that was read."""
