"""The `muster` command: parse, call, print."""
