"""The workers of a phase on Ray: placed, started, watched, called and ended."""
