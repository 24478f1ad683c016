"""Models that came of runs: exported, asked, evaluated."""
