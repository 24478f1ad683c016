"""What it brings that a rollout group writes beside the others: scored round by round,
or an iteration ahead; and what is learnt then.

Two groups of one worker each, all roles and the writer, on a core each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import peers, trl_ppo
from benchmarks.options import Options
from benchmarks.record import ratios, spread
from benchmarks.workload import Shape

APART = [{"roles": ["policy", "reference", "critic", "reward"], "workers": 1}, {"roles": ["rollout"], "workers": 1}]
WAYS: dict[str, dict[str, Any]] = {
    "turns": {"generation_batch": trl_ppo.ROLLOUT_BATCH},
    "rounds": {"generation_batch": trl_ppo.ROLLOUT_BATCH // 4},
    "ahead": {"generation_batch": trl_ppo.ROLLOUT_BATCH, "async": 1},
}
"""Scored when all are written; while the rest is written; learnt from while the next ones are written."""
TINY = Shape(128, 256, 2, 4)
"""A model that can be seen to learn in minutes."""
STRONG = {
    "response_tokens": 16, "batch": 8, "learning_rate": 1e-3, "critic_learning_rate": 3e-3, "kl": {"beta": 0.01},
}  # fmt: skip
"""Many updates of the weights, and large ones: what is written ahead is far behind."""
LEARNT = 60
"""Iterations of a run that learns."""
LAST = 10
"""Iterations at its ends whose mean reward is compared."""
REWARD = "def score(prompts, completions, **columns):\n    return [text.count('a') / 2 for text in completions]\n"


@dataclass(frozen=True)
class Learning:
    """Of one run."""

    rewards: list[float]
    staleness_kl: float
    """The largest of all iterations."""

    @property
    def gained(self) -> float:
        """Between the first iterations and the last."""
        return mean(self.rewards[-LAST:]) - mean(self.rewards[:LAST])


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of the three ways with 15.5 million parameters for the time,
    of two with a tiny model for what is learnt."""
    return {
        "rollout_batch": trl_ppo.ROLLOUT_BATCH,
        **_time(options, folder / "time"),
        "learning": _learning(options, folder / "learning"),
    }


def _time(options: Options, folder: Path) -> dict[str, Any]:
    roles = peers.apart(trl_ppo.make, folder)
    iterations = 1 + max(2, options.steps // 3)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way, settings in WAYS.items():
            place = folder / f"{way}-{number}"
            curve, _ = trl_ppo.muster(roles, options, iterations, place, folder / "cache", groups=APART, **settings)
            seconds[way].append(curve.wall_step_s)
    return {
        "iterations": iterations - 1,
        **{f"{way}_iteration_s": spread(each, 2) for way, each in seconds.items()},
        **{f"{way}_to_turns": ratios(seconds[way], seconds["turns"]) for way in ("rounds", "ahead")},
    }


def _learning(options: Options, folder: Path) -> dict[str, Any]:
    roles = peers.apart(trl_ppo.make, folder, TINY)
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    roles = replace(roles, reward=Path(f"{reward}:score"))
    runs: dict[str, list[Learning]] = {way: [] for way in ("turns", "ahead")}
    for number in range(options.rounds):
        for way, of_way in runs.items():
            settings = {**WAYS[way], **STRONG, "critic": str(roles.policy), "seed": number}
            place = folder / f"{way}-{number}"
            _, rows = trl_ppo.muster(roles, options, LEARNT, place, folder / "cache", groups=APART, **settings)
            of_way.append(Learning([row["reward"] for row in rows], max(row.get("staleness_kl", 0.0) for row in rows)))
    return {
        "iterations": LEARNT,
        "ahead_gained_to_turns": ratios(*([run.gained for run in runs[way]] for way in ("ahead", "turns"))),
        **{f"{way}_gained": spread([run.gained for run in of_way]) for way, of_way in runs.items()},
        "staleness_kl": spread([run.staleness_kl for run in runs["ahead"]]),
    }
