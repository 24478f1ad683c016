"""The driver of PPO: generate, score, estimate advantages, improve; again for every iteration.
It asks the roles, who compute.

Roles in different groups work at the same time: whatever does not depend on an answer is asked before it is waited for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from training.config import PPO, Stop
from training.drivers.evaluating import Interrupted, answered, is_evaluated_at
from training.drivers.hooks import Hooks, note_damage
from training.drivers.profiled_steps import Profiled
from training.drivers.restore import SETUP_S, resume
from training.drivers.saver import Saver
from training.errors import Diverged
from training.group import Future, Group, results, results_of
from training.phase_info import PhaseInfo
from training.rl.estimation import State, estimate, weigh
from training.rl.experience import Experience, Response
from training.schedule import learning_rate
from training.seeding import seed_for
from training.storage import StoragePath

PART_S = 7200.0
"""Longest time for one part of an iteration."""
_SAMPLES = 4
"""Responses of an iteration that are written down."""
LEARNERS = ("policy", "critic")
_SAYS = {"policy": "old", "reference": "reference", "critic": "values"}
"""Who is dealt responses to say something of every token, and what the fact is called."""
_Asked = tuple[str, list[int], list[Future]]
"""What is asked about responses: the fact, the order of the answers, those who answer."""


def run(phase: PPO, groups: Mapping[str, Group], hooks: Hooks) -> StoragePath | None:
    """Train the phase to its end; returns the checkpoint that it ends with, or None if it was asked to stop before."""
    infos: list[PhaseInfo] = results_of(groups, "setup", timeout_s=SETUP_S)["policy"]
    note_damage(infos, hooks)
    info = infos[0]
    learners = {role: groups[role] for role in LEARNERS}
    found = resume(learners, hooks, info)
    results_of(learners, "get_ready", timeout_s=SETUP_S)
    step, state = (found.step, State(**found.state)) if found is not None else (0, State(phase.kl.beta))
    loop = _Loop(phase, groups, info, state, hooks.stop_requested)
    saver = Saver(phase, learners, hooks, info, newest=step)
    profiled = Profiled(phase, groups, hooks)
    is_last = step == info.total_steps or bool(state.reached)
    is_due = found is not None and not found.metrics and _evaluates(phase, step, is_last=is_last)
    hooks.started(info, step, evaluates=is_due)
    is_evaluated = True
    if is_due or (phase.eval_on_start and step == 0):
        is_evaluated = _evaluate(groups["policy"], hooks, partial(saver.attend, step, loop.remembered), saver, step)
    while step < info.total_steps and not state.reached and not hooks.stop_requested():
        step += 1
        profiled.before(step)
        try:
            with saver.kept_on_failure():
                row, experience = loop.iterate(step)
        except Interrupted:
            profiled.end(step)
            step -= 1
            break
        profiled.after(step)
        hooks.log({"step": step, "iteration": step, **row, "workers": groups["policy"].size})
        hooks.samples(step, experience.table(_SAMPLES))
        state.reached = reached(phase.stop, row)
        is_last = step == info.total_steps or bool(state.reached)
        saver.poll()
        if is_last:
            saver.last_step = step
        if saver.is_due(step):
            saver.save(step, loop.remembered())
        if _evaluates(phase, step, is_last=is_last):
            is_evaluated = _evaluate(groups["policy"], hooks, partial(saver.attend, step, loop.remembered), saver, step)
    profiled.end(step)
    if state.reached:
        hooks.event("reached", step=step, what=state.reached)
        saver.last_step = step
    last = saver.end(step, loop.remembered())
    return last if is_evaluated else None


def reached(stop: Stop, row: Mapping[str, Any]) -> str:
    """Why an iteration with these metrics is the last, if it is."""
    if stop.reward is not None and row["reward"] >= stop.reward:
        return f"the mean reward {row['reward']:.4g} has reached {stop.reward:g}"
    if stop.kl is not None and row["kl"] > stop.kl:
        return f"the KL {row['kl']:.4g} has passed {stop.kl:g}"
    return ""


class _Loop:
    """The iterations."""

    def __init__(
        self,
        phase: PPO,
        groups: Mapping[str, Group],
        info: PhaseInfo,
        state: State,
        stop_requested: Callable[[], bool],
    ):
        self.phase, self.info, self.state, self.stop_requested = phase, info, state, stop_requested
        self.policy, self.critic, self.reward = groups["policy"], groups["critic"], groups["reward"]
        self.rollout = groups.get("rollout")
        self.computing = {role: groups[role] for role in _SAYS}
        limits = results_of(self.computing, "limits", timeout_s=SETUP_S)
        self.limits = {role: answers[0] for role, answers in limits.items()}
        self.ahead = Experience.loaded(state.ahead) if state.ahead else None
        """Responses that were written ahead, by a policy that is no more."""
        self._being_written: list[list[Future]] = []
        """By rounds."""
        self._being_told: list[list[Future]] = []
        """What their writers say of them."""
        self.seconds: dict[str, float] = {}

    def iterate(self, step: int) -> tuple[dict[str, Any], Experience]:
        """One iteration. Returns its metrics and what it was learnt from.

        Raises Diverged, and Interrupted if the run is to stop before anything is learned: all is as it was before.
        """
        began, worked = time.perf_counter(), time.thread_time()
        self.seconds = {}
        asked = [(written, self.ask(written)) for written in self.written(step)]
        with self._timed("score"):
            for written, answers in asked:
                _take(written, answers)
        experience = Experience.together([written for written, _ in asked])
        if self.stop_requested():
            if self.phase.async_:  # the policy that wrote this cannot be had again
                self.ahead, self._being_written = experience, []
            raise Interrupted
        measures = estimate(experience, self.phase, self.state)
        if self.phase.async_:
            measures |= weigh(experience)
        with self._timed("learn"):
            learnt = self.improve(experience, step)
        self.state.follow(self.phase.kl, measures["kl"], len(experience))
        # Waiting is not counted: without Ray it is all of the models' work, with it the driver's own.
        self.seconds["driver_s"] = time.thread_time() - worked
        row = {**learnt, **measures, "step_s": time.perf_counter() - began, **self.seconds}
        row["tokens_per_s"] = row["tokens"] / row["step_s"]
        _check_finite(row, step)
        return row, experience

    def sync(self, rollout: Group) -> None:
        """Send the policy's weights to those who write, piece by piece: a piece is gathered while
        the one before is loaded."""
        pieces = results(self.policy.call("num_buckets"), PART_S)[0]
        loading: list[Future] = []
        for number in range(pieces):
            first, *_ = self.policy.call("bucket", number)
            before, loading = loading, rollout.call("load", first)
            results(before, PART_S)
        results(loading, PART_S)

    def written(self, step: int) -> Iterator[Experience]:
        """Responses to the prompts of an iteration, those of a round as soon as they are there. Raises Interrupted."""
        if self.phase.async_:
            yield self._written_ahead(step)
            return
        for futures in self._begin_to_write(step):
            with self._timed("generate"):
                experience = _experience_of(futures)
            if self.stop_requested():
                raise Interrupted
            yield experience

    def _begin_to_write(self, step: int) -> list[list[Future]]:
        """Ask for all rounds: by a rollout group, who get the policy's weights before,
        or by the policy's own workers."""
        writers = self.policy
        if self.rollout is not None:
            writers = self.rollout
            with self._timed("sync"):
                self.sync(writers)
        with self._timed("generate"):
            return [writers.call("roll_out", step, nth) for nth in range(self.phase.rollout.rounds(writers.size))]

    def _written_ahead(self, step: int) -> Experience:
        """All of them, from a rollout group, who begin to write the next ones."""
        if self.ahead is None and not self._being_written:
            self._begin_to_write_ahead(step)
        with self._timed("generate"):
            experience = self._taken()
        if step < self.info.total_steps:
            self._begin_to_write_ahead(step + 1)
        return experience

    def _begin_to_write_ahead(self, step: int) -> None:
        assert self.rollout is not None
        self._being_written = self._begin_to_write(step)
        # Asked now, or it would be computed while others wait.
        self._being_told = [self.rollout.map("log_probs", futures) for futures in self._being_written]

    def _taken(self) -> Experience:
        """What has been begun; with what the policy that wrote it says of it, since another one will learn from it."""
        if self.ahead is not None:
            experience, self.ahead = self.ahead, None
            return experience
        parts = [_experience_of(futures) for futures in self._being_written]
        for part, told in zip(parts, self._being_told, strict=True):
            part.fields["written"] = [values for of_worker in results(told, PART_S) for values in of_worker]
        self._being_written = []
        return Experience.together(parts)

    def remembered(self) -> dict[str, Any]:
        """What an iteration leaves to the next, for a checkpoint. Waits
        for what is being written: its policy cannot be had again."""
        if self._being_written and not self.state.reached:
            self.ahead = self._taken()
        return asdict(replace(self.state, ahead=self.ahead.dumped() if self.ahead else ""))

    def ask(self, experience: Experience) -> list[_Asked]:
        """Ask all roles at once what they say of responses, and what these are worth."""
        asked = []
        for role, group in self.computing.items():
            shares, order = experience.shard(group.size, self.limits[role])
            asked.append((_SAYS[role], order, group.map("computed", shares)))
        places = [list(range(len(experience)))[rank :: self.reward.size] for rank in range(self.reward.size)]
        parts = [[experience.responses[i] for i in share] for share in places]
        return [*asked, ("score", list(chain(*places)), self.reward.map("scores", parts))]

    def improve(self, experience: Experience, step: int) -> dict[str, Any]:
        """Passes over the responses in minibatches, policy and critic at the same time.
        Returns the means of the losses."""
        phase, total = self.phase, self.info.total_steps
        rate, of_critic = (
            learning_rate(peak, phase.schedule, step, total)
            for peak in (phase.learning_rate, phase.critic_learning_rate)
        )
        of_policy: list[dict[str, Any]] = []
        values: list[dict[str, Any]] = []
        passes = 0
        for number in range(phase.ppo_epochs):
            minibatches = _minibatches(len(experience), phase.batch, seed_for(phase.seed, "ppo", step, number))
            asked = []
            if step > phase.critic_warmup:
                names, numbers = self._told_policy()
                futures = self._learn("policy", self.policy, experience, minibatches, rate, names, numbers)
                asked.append((of_policy, futures))
            names, numbers = self._told_critic(step)
            asked.append(
                (values, self._learn("critic", self.critic, experience, minibatches, of_critic, names, numbers))
            )
            for answers, futures in asked:
                answers.append(_together(results(futures, PART_S)))
            passes += 1
            if phase.kl.stop is not None and of_policy and _mean(of_policy[-1:], "approx_kl") > phase.kl.stop:
                break
        learnt = {
            name: _mean(of_policy, name)
            for name in ("policy_loss", "clip_fraction", "approx_kl", "entropy")
            if of_policy
        }
        return {
            **learnt,
            "value_loss": _mean(values, "value_loss"),
            "loss": learnt.get("policy_loss", 0.0),
            "grad_norm": max(norm for each in of_policy or values for norm in each["grad_norms"]),
            "critic_grad_norm": max(norm for each in values for norm in each["grad_norms"]),
            "learning_rate": rate,
            "ppo_epochs": passes,
            "memory_gib": max(each["memory_gib"] for each in of_policy + values),
        }  # fmt: skip

    def _told_policy(self) -> tuple[tuple[str, ...], dict[str, float]]:
        """The facts and numbers that its loss needs."""
        names = ("old", "advantages", *(["importance"] if self.phase.async_ else []))
        if self.phase.kl.estimator == "k3":
            return (*names, "reference"), {"beta": self.state.beta}
        return names, {}

    def _told_critic(self, step: int) -> tuple[tuple[str, ...], dict[str, float]]:
        # While it warms up it may start from another scale, such as a reward model's: the clip would hold it there.
        clip = self.phase.value_clip if step > self.phase.critic_warmup else None
        return ("values", "returns"), {} if clip is None else {"clip": clip}

    def _learn(
        self,
        role: str,
        group: Group,
        experience: Experience,
        minibatches: Sequence[Sequence[int]],
        rate: float,
        names: Sequence[str],
        numbers: Mapping[str, float],
    ) -> list[Future]:
        shard = [experience.shard(group.size, self.limits[role], names, places)[0] for places in minibatches]
        weights = [sum(len(experience.responses[i].tokens) for i in places) for places in minibatches]
        shards = [[shares[rank] for shares in shard] for rank in range(group.size)]
        return group.map("improve", shards, weights, rate, names, numbers)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[f"{part}_s"] = self.seconds.get(f"{part}_s", 0.0) + time.perf_counter() - began


def _experience_of(futures: Sequence[Future]) -> Experience:
    shares: list[list[Response]] = results(futures, PART_S)
    return Experience([response for share in shares for response in share])


def _take(experience: Experience, asked: Sequence[_Asked]) -> None:
    for name, order, futures in asked:
        experience.set(name, order, results(futures, PART_S))


def _minibatches(count: int, size: int, seed: int) -> list[list[int]]:
    order = np.random.Generator(np.random.Philox(seed)).permutation(count).tolist()
    return [order[start : start + size] for start in range(0, count, size)]


def _together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all workers of a role say of the same updates: the same, but for their memory."""
    return {**answers[0], "memory_gib": max(answer["memory_gib"] for answer in answers)}


def _mean(passes: Sequence[dict[str, Any]], name: str) -> float:
    values = [means[name] for each in passes for means in each["means"]]
    return float(sum(values) / len(values))


def _check_finite(row: Mapping[str, Any], step: int) -> None:
    odd = [
        name
        for name in ("loss", "value_loss", "grad_norm", "critic_grad_norm", "reward", "kl")
        if not math.isfinite(row[name])
    ]
    if odd:
        told = ", ".join(f"{name} is {row[name]}" for name in odd)
        raise Diverged(f"iteration {step}: {told}: training has diverged", step=step)


def _evaluates(phase: PPO, step: int, *, is_last: bool) -> bool:
    return phase.eval is not None and (is_last or is_evaluated_at(phase, step))


def _evaluate(policy: Group, hooks: Hooks, between: Callable[[], None], saver: Saver, step: int) -> bool:
    """Accuracy on questions. False if the run is to stop: then it is due when the run goes on."""
    began = time.perf_counter()
    try:
        with saver.kept_on_failure():
            metrics, speed = answered(policy, hooks, step, between)
    except Interrupted:
        return False
    hooks.log({"step": step, **metrics, **speed, "evaluation_s": time.perf_counter() - began})
    saver.evaluated(step, metrics)
    return True
