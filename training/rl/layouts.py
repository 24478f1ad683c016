"""Ways to place the roles of PPO on the workers of a phase, for `muster plan` to compare."""

from __future__ import annotations

from collections.abc import Iterator

from training.config import PPO, Placement


def layouts(phase: PPO) -> Iterator[tuple[str, list[Placement] | None]]:
    """Ways to place the roles on as many workers as the phase has."""
    count = phase.num_workers
    half, quarter = count // 2, count // 4
    judged = any(source.is_model for source in phase.rewards)
    yield f"all roles on {count}", None
    if half:
        yield (
            f"policy, reference on {count - half}; critic, reward on {half}",
            [
                Placement(roles=["policy", "reference"], workers=count - half),
                Placement(roles=["critic", "reward"], workers=half),
            ],
        )
    if quarter:
        rest = count - half - quarter
        yield (
            f"policy, reference on {quarter}; critic, reward on {rest}; rollout on {half}",
            [
                Placement(roles=["policy", "reference"], workers=quarter),
                Placement(roles=["critic", "reward"], workers=rest),
                Placement(roles=["rollout"], workers=half),
            ],
        )
    if judged and count >= 8:
        eighth = count // 8
        yield (
            f"policy, critic on {half}; reference, reward on {2 * eighth}; rollout on {count - half - 2 * eighth}",
            [
                Placement(roles=["policy", "critic"], workers=half),
                Placement(roles=["reference", "reward"], workers=2 * eighth),
                Placement(roles=["rollout"], workers=count - half - 2 * eighth),
            ],
        )
