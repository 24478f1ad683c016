"""Memory of one worker of PPO, by formula: the roles that it hosts, and the base model that several of them share.

The arithmetic of one role is that of training/estimate/memory.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from training.config import PPO, Sharding
from training.estimate.memory import (
    Kind,
    Models,
    Needs,
    Parts,
    Setting,
    frozen,
    learning,
    saving,
    states,
    trained,
    writing,
)
from training.estimate.parameters import Shape


def of_roles(phase: PPO, roles: Sequence[str], models: Models, where: Setting) -> Needs:
    """States of all roles, and whatever takes most of what they do one after the other."""
    needs = Needs()
    moments: list[Parts] = []
    one_base = phase.shares_base and "policy" in roles

    def learner(role: str, shape: Shape, kind: Kind, base_is_there: bool) -> None:
        nonlocal needs
        held = states(shape, where)
        # Only the one that learns has gradients, but for those that ZeRO-3 keeps room for.
        passing = Counter() if where.stage == 3 else Counter({"gradients": held.device.pop("gradients", 0)})
        if base_is_there:
            held.device["weights"] = where.bytes * trained(shape, where.lora)
        needs += _named(role, held + Needs(host=saving(shape, where)))
        moments.append(
            Counter({f"{role} {what}": size for what, size in (learning(shape, where, kind) + passing).items()})
        )

    for role in roles:
        if role == "policy":
            learner(role, models.trained, "policy", False)
        elif role == "critic" and models.critic is not None:
            learner(role, models.critic, "classifier", one_base and models.critic.hidden == models.trained.hidden)
        elif role == "reference" and not one_base:
            needs += _named(role, Needs(frozen(models.trained, where, sharded=True)))
        elif role == "reward":
            for shape in models.rewards:
                needs += _named(role, Needs(frozen(shape, where, sharded=False)))
        elif role == "rollout":
            needs += _named(
                role, Needs(frozen(models.trained, replace(where, sharding=Sharding(stage=2)), sharded=True))
            )
    writes = "rollout" if "rollout" in roles else "policy" if "policy" in roles and not _has_rollout(phase) else ""
    if writes:
        tokens = phase.data.max_length + phase.new_tokens
        parts = writing(
            models.trained,
            where,
            tokens=tokens,
            responses=phase.rollout.responses,
            batch=phase.rollout.batch,
            gathers=writes == "policy",
        )
        moments.append(Counter({f"{writes} {what}": size for what, size in parts.items()}))
    most = max(moments, key=lambda parts: sum(parts.values()), default=Counter())
    return needs + Needs(most)


def _has_rollout(phase: PPO) -> bool:
    return any("rollout" in roles for roles, _ in phase.placements)


def _named(role: str, needs: Needs) -> Needs:
    return Needs(
        *(Counter({f"{role} {what}": size for what, size in parts.items()}) for parts in (needs.device, needs.host))
    )
