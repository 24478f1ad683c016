"""What stands in metrics.jsonl, by recipe: the one table of names, labels, units and meanings. Free of torch.

The reference page is generated from it, whoever shows a curve labels it from here, and a test fails for a recipe that measures
what is not in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One column."""

    label: str
    """What to call it beside a curve."""
    unit: str
    """Empty for a plain number; `0 to 1` for a share."""
    meaning: str


Columns = dict[str, Metric]

ROW: Columns = {
    "step": Metric("step", "", "The step after which the row was written, counted from 1."),
    "attempt": Metric("attempt", "", "Which start of the run wrote the row: above 1 it was interrupted before and went on."),
}  # fmt: skip
"""Of every row."""

STEP: Columns = {
    "learning_rate": Metric("learning rate", "", "How far a step moves the weights, by the schedule."),
    "grad_norm": Metric("gradient norm", "", "Size of the change that the batch asks for, before `clip` shortens it. One that jumps or grows foretells a diverging loss."),
    "samples": Metric("samples of a step", "samples", "How many samples the step learnt from, over all workers."),
    "tokens": Metric("tokens of a step", "tokens", "How many tokens the step computed, over all workers, padding left out."),
    "step_s": Metric("time of a step", "s", "How long the step took by the clock."),
    "tokens_per_s": Metric("speed", "tokens/s", "Tokens a second of all workers together."),
    "memory_gib": Metric("memory", "GiB", "The most that any worker has taken so far: of its GPU, or where there is none the memory of its process."),
    "workers": Metric("workers", "", "How many workers took part; of PPO those of the policy."),
}  # fmt: skip
"""Of a step of any recipe."""

_SUPERVISED: Columns = {
    "data_s": Metric("time for data", "s", "The part of `step_s` in which worker 0 put its micro-batches together, before it began to compute."),
    "target_tokens": Metric("tokens learnt", "tokens", "Tokens that the loss is about: answers without their questions, all of a text but its first token."),
    "skipped": Metric("left out", "true", "Stands in place of all other metrics: the batch made the loss diverge and is not learnt from (`on_divergence: skip`)."),
}  # fmt: skip

_LANGUAGE: Columns = {
    "loss": Metric("loss", "nats a token", "How surprised the model was by the tokens it should have written, on average: 0 is certain of every one, ln(vocabulary) is a guess."),
}  # fmt: skip

_HELD_OUT: Columns = {
    "eval_loss": Metric("held-out loss", "nats a token", "The loss on rows that are not trained on. When it rises while the loss falls, the model learns by heart."),
}  # fmt: skip


def _answers(prefix: str, what: str, right: str) -> Columns:
    """Of responses that are judged; `right`: what a right one is."""
    return {
        f"eval_{prefix}accuracy": Metric(f"{what} right", "0 to 1", f"Share of held-out questions whose {right}."),
        f"eval_{prefix}accuracy_low": Metric(f"{what} right, at least", "0 to 1", "Lower end of its 95 % interval: what chance alone leaves open."),
        f"eval_{prefix}accuracy_high": Metric(f"{what} right, at most", "0 to 1", "Upper end of its 95 % interval."),
        f"eval_{prefix}pass@K": Metric(f"right in one of K {what}", "0 to 1", "Share of questions of which at least one of K responses is right; only with `eval.samples` above 1."),
        f"eval_{prefix}ended": Metric(f"{what} that ended", "0 to 1", "Share of responses that came to their end; the others were cut off at `eval.max_new_tokens`."),
        f"eval_{prefix}response_tokens": Metric(f"length of {what}", "tokens", "Mean length of these responses."),
    }  # fmt: skip


_EVALUATION: Columns = {
    "evaluation_s": Metric("time of an evaluation", "s", "How long the evaluation took by the clock."),
}  # fmt: skip

_ANSWERS: Columns = {
    **_answers("", "answers", "final answer is the expected one"),
    **_answers("verdict_", "verdicts", "critique concludes what is known (`eval.verdicts`)"),
}
_ANSWERS_SPEED: Columns = {
    "eval_tokens_per_s": Metric("speed of answering", "tokens/s", "Tokens a second that all workers wrote while they answered."),
}  # fmt: skip


def _pairs(prefix: str, of: str) -> Columns:
    return {
        f"{prefix}loss": Metric(f"loss{of}", "nats a pair", "-log sigmoid(chosen - rejected - margin): 0.69 is a coin's throw, 0 is certain and right."),
        f"{prefix}accuracy": Metric(f"pairs in order{of}", "0 to 1", "Share of pairs of which the preferred answer got the higher score; 0.5 is chance."),
        f"{prefix}margin": Metric(f"distance of a pair{of}", "score", "Mean of the preferred answer's score minus the other's."),
        f"{prefix}reward_mean": Metric(f"mean score{of}", "score", "Mean of the scores of all answers. Its level means nothing by itself; only differences are learnt."),
        f"{prefix}reward_std": Metric(f"spread of scores{of}", "score", "Standard deviation of the scores of all answers: what a difference is to be measured by."),
    }  # fmt: skip


_PPO: Columns = {
    "iteration": Metric("iteration", "", "As `step`: a step of PPO is an iteration of writing, scoring and learning."),
    "samples": Metric("responses", "responses", "How many responses the iteration wrote."),
    "tokens": Metric("tokens written", "tokens", "Tokens of all responses of the iteration; prompts are not counted."),
    "tokens_per_s": Metric("speed", "tokens/s", "Tokens of responses a second of the whole iteration, all its parts."),
    "reward": Metric("reward of a response", "score", "Mean of what the rewards gave the responses, added up by their weights, before clipping and penalties. What PPO is to raise."),
    "reward_std": Metric("spread of rewards", "score", "Standard deviation over the responses of the iteration. Near 0 there is nothing to tell better from worse by."),
    "kl": Metric("distance from the start", "nats a response", "KL: how far the policy has gone from what it was, summed over a response. The reward is paid for with it."),
    "beta": Metric("price of distance", "score a nat", "Weight of the KL penalty; moves only with `kl.target`."),
    "entropy": Metric("variety", "nats a token", "Entropy of the next token: 0 means that the policy always says the same."),
    "response_tokens": Metric("length of a response", "tokens", "Mean length of the responses, the end-of-text token included."),
    "ended": Metric("responses that ended", "0 to 1", "Share of responses that came to their end; the others were cut off at `response_tokens`."),
    "loss": Metric("policy's loss", "", "As `policy_loss`, 0 while the critic warms up. It need not fall: watch the reward."),
    "policy_loss": Metric("policy's loss", "", "The clipped objective of PPO, minimised, with the entropy bonus and the penalty of `k3` where they are set. Not there while the critic warms up."),
    "clip_fraction": Metric("clipped tokens", "0 to 1", "Share of tokens whose probability had moved as far as `clip_range` allows, so that they counted no more."),
    "approx_kl": Metric("distance gone in an iteration", "nats a token", "KL between the policy that wrote the responses and the one that is learning from them; `kl.stop` acts on it."),
    "behind_kl": Metric("distance from the writer", "nats a token", "KL between the policy that wrote the responses and the one that begins to learn from them; of `async: 1` alone."),
    "value_loss": Metric("critic's loss", "score squared", "Half of the mean squared error of the critic."),
    "explained_variance": Metric("explained by the critic", "at most 1", "How much of the differences between returns the critic foresaw: 1 all, 0 no more than their mean, below 0 less than that."),
    "critic_grad_norm": Metric("critic's gradient norm", "", "As `grad_norm`, of the critic; both are the largest of the iteration."),
    "ppo_epochs": Metric("passes", "", "Passes over the responses of the iteration; fewer than the setting if `kl.stop` ended them."),
    "sync_s": Metric("time of sending weights", "s", "Sending the policy's weights to a rollout group, if there is one."),
    "generate_s": Metric("time of writing", "s", "Writing the responses."),
    "score_s": Metric("time of scoring", "s", "What is left of asking policy, reference, critic and rewards about them when all are written."),
    "learn_s": Metric("time of learning", "s", "Changing policy and critic."),
    "driver_s": Metric("work of the driver", "s", "What the process that drives the run computed itself, waiting left out."),
}  # fmt: skip

_OF_LANGUAGE = {**ROW, **_LANGUAGE, **STEP, **_SUPERVISED, **_HELD_OUT, **_ANSWERS, **_ANSWERS_SPEED, **_EVALUATION}

METRICS: dict[str, Columns] = {
    "pretrain": _OF_LANGUAGE,
    "sft": _OF_LANGUAGE,
    "cft": _OF_LANGUAGE,
    "reward": {**ROW, **_pairs("", ""), **STEP, **_SUPERVISED, **_pairs("eval_", ", held out"), **_EVALUATION},
    "ppo": {**ROW, **STEP, **_PPO, **_ANSWERS, **_ANSWERS_SPEED, **_EVALUATION},
}
"""By recipe, in the order in which a person wants to read them."""


def metric(recipe: str, name: str) -> Metric | None:
    """What a column of a recipe is; None if nothing is known of it."""
    return METRICS.get(recipe, {}).get(re.sub(r"pass@\d+$", "pass@K", name))
