"""All metrics in metrics.jsonl: names, labels, units and meanings. Imports no torch.

The reference page and the labels of curves come from it, and a test fails for a metric that is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Metric:
    """One column."""

    label: str
    """Label of a curve."""
    unit: str
    """Empty for a plain number; `0 to 1` for a fraction."""
    meaning: str


Columns = dict[str, Metric]

ALIASES = {
    "ended": "eos_rate",
    "behind_kl": "staleness_kl",
    "eval_ended": "eval_eos_rate",
    "eval_verdict_ended": "eval_verdict_eos_rate",
}
"""Current names by the names before 0.2. This version writes both; rows with either can be read."""


def with_current_names(row: Mapping[str, Value]) -> dict[str, Value]:
    """A row of metrics that any version wrote, with the current names only."""
    return {ALIASES.get(name, name): value for name, value in row.items()}


def with_old_names(value: Any) -> Any:
    """A row of metrics, or data that contain such rows, with each renamed metric under both of its names."""
    if isinstance(value, list):
        return [with_old_names(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    row = {name: with_old_names(item) for name, item in value.items()}
    return row | {old: row[name] for old, name in ALIASES.items() if name in row}


ROW: Columns = {
    "step": Metric("step", "", "The step after which the row was written, counted from 1."),
    "attempt": Metric(
        "attempt",
        "",
        "The attempt that wrote the row. Above 1 the run was interrupted before and resumed.",
    ),
}
"""Columns of every row."""

STEP: Columns = {
    "learning_rate": Metric("learning rate", "", "Learning rate of the step, by the schedule."),
    "grad_norm": Metric(
        "gradient norm",
        "",
        "Norm of the gradient before it is clipped (`clip`). A norm that jumps or grows often precedes a diverging"
        " loss.",
    ),
    "samples": Metric("samples per step", "samples", "Samples in the step, over all workers."),
    "tokens": Metric("tokens per step", "tokens", "Tokens computed in the step, over all workers, without padding."),
    "step_s": Metric("step time", "s", "Wall-clock time of the step."),
    "tokens_per_s": Metric("throughput", "tokens/s", "Tokens per second of all workers together."),
    "memory_gib": Metric(
        "peak memory",
        "GiB",
        "The most memory that any worker has used so far: GPU memory, or the memory of the process if there is no GPU.",
    ),
    "workers": Metric("workers", "", "Number of workers; with PPO, of the policy's workers."),
}
"""Columns of a step of any recipe."""

_SUPERVISED: Columns = {
    "data_s": Metric(
        "data time",
        "s",
        "The part of `step_s` in which worker 0 assembled its micro-batches before it began to compute.",
    ),
    "target_tokens": Metric(
        "target tokens",
        "tokens",
        "Tokens in the loss: answers without their questions, or all tokens of a text except the first.",
    ),
    "skipped": Metric(
        "skipped",
        "true",
        "Replaces all other metrics of the row: the batch made the loss diverge and was skipped (`on_divergence: "
        "skip`).",
    ),
}

_LANGUAGE: Columns = {
    "loss": Metric(
        "loss",
        "nats per token",
        "Mean cross-entropy of the target tokens: 0 is certainty about every token, ln(vocabulary) is a uniform guess.",
    ),
}

_HELD_OUT: Columns = {
    "eval_loss": Metric(
        "held-out loss",
        "nats per token",
        "The loss on held-out rows. If it rises while the training loss falls, the model overfits.",
    ),
}


def _answers(prefix: str, what: str, right: str) -> Columns:
    """Metrics of responses that are compared with a known answer; `right` says when a response is correct."""
    return {
        f"eval_{prefix}accuracy": Metric(
            f"{what} accuracy", "0 to 1", f"Fraction of held-out questions for which {right}."
        ),
        f"eval_{prefix}accuracy_low": Metric(
            f"{what} accuracy, low", "0 to 1", "Lower end of the 95 % confidence interval."
        ),
        f"eval_{prefix}accuracy_high": Metric(
            f"{what} accuracy, high", "0 to 1", "Upper end of the 95 % confidence interval."
        ),
        f"eval_{prefix}pass@K": Metric(
            f"{what} pass@K",
            "0 to 1",
            "Fraction of questions for which at least one of K responses is correct; only with `eval.samples` above 1.",
        ),
        f"eval_{prefix}eos_rate": Metric(
            f"finished {what}s",
            "0 to 1",
            "Fraction of responses that ended by themselves; the others were cut off at `eval.max_new_tokens`.",
        ),
        f"eval_{prefix}response_tokens": Metric(f"{what} length", "tokens", "Mean length of these responses."),
    }


_EVALUATION: Columns = {
    "evaluation_s": Metric("evaluation time", "s", "Wall-clock time of the evaluation."),
}

_ANSWERS: Columns = {
    **_answers("", "answer", "the final answer is the expected one"),
    **_answers("verdict_", "verdict", "the conclusion of the critique is the known verdict (`eval.verdicts`)"),
}
_ANSWERS_SPEED: Columns = {
    "eval_tokens_per_s": Metric(
        "generation throughput",
        "tokens/s",
        "Tokens per second that all workers together generated in the evaluation.",
    ),
}


def _pairs(prefix: str, of: str) -> Columns:
    return {
        f"{prefix}loss": Metric(
            f"loss{of}",
            "nats per pair",
            "-log sigmoid(chosen - rejected - margin): 0.69 is a random guess, 0 is certain and correct.",
        ),
        f"{prefix}accuracy": Metric(
            f"pair accuracy{of}",
            "0 to 1",
            "Fraction of pairs whose preferred answer has the higher score; 0.5 is a random guess.",
        ),
        f"{prefix}margin": Metric(
            f"score margin{of}", "score", "Mean difference between the scores of the preferred and the rejected answer."
        ),
        f"{prefix}reward_mean": Metric(
            f"mean score{of}",
            "score",
            "Mean score of all answers. Only differences are trained, so its level has no meaning.",
        ),
        f"{prefix}reward_std": Metric(
            f"score spread{of}",
            "score",
            "Standard deviation of the scores of all answers, the scale for differences between scores.",
        ),
    }


_POLICY: Columns = {
    "iteration": Metric(
        "iteration",
        "",
        "The same as `step`: a step of PPO is an iteration of generation, scoring and training.",
    ),
    "samples": Metric("responses", "responses", "Number of responses in the iteration."),
    "tokens": Metric(
        "response tokens per step",
        "tokens",
        "Tokens of all responses of the iteration, without the prompts.",
    ),
    "tokens_per_s": Metric("throughput", "tokens/s", "Response tokens per second of the whole iteration."),
    "reward": Metric(
        "reward per response",
        "score",
        "Mean weighted sum of the rewards, before clipping and penalties. This is what PPO increases.",
    ),
    "reward_std": Metric(
        "reward spread",
        "score",
        "Standard deviation over the responses of the iteration. Near 0, the rewards do not distinguish the responses.",
    ),
    "kl": Metric(
        "KL from the start",
        "nats per response",
        "KL divergence of the policy from where it started, summed over a response. It is the cost of a higher reward.",
    ),
    "beta": Metric("KL weight", "score per nat", "Weight of the KL penalty. It changes only with `kl.target`."),
    "entropy": Metric(
        "entropy",
        "nats per token",
        "Entropy of the next token. At 0 the policy always generates the same response.",
    ),
    "response_tokens": Metric(
        "response length",
        "tokens",
        "Mean length of the responses, including the end-of-text token.",
    ),
    "eos_rate": Metric(
        "finished responses",
        "0 to 1",
        "Fraction of responses that ended by themselves; the others were cut off at `response_tokens`.",
    ),
    "loss": Metric(
        "policy loss",
        "",
        "The same as `policy_loss`, or 0 while the critic warms up. It need not fall; watch the reward.",
    ),
    "policy_loss": Metric(
        "policy loss",
        "",
        "The clipped objective of PPO, minimized, with the entropy bonus and the penalty of `k3` if they are set. "
        "Absent while the critic warms up.",
    ),
    "clip_fraction": Metric(
        "clipped tokens",
        "0 to 1",
        "Fraction of tokens whose probability ratio was outside `clip_range`, so that they did not contribute.",
    ),
    "approx_kl": Metric(
        "KL within the iteration",
        "nats per token",
        "KL divergence between the policy that generated the responses and the one that is being trained; "
        "`kl.stop` limits it.",
    ),
    "staleness_kl": Metric(
        "KL by staleness",
        "nats per token",
        "KL divergence between the policy that generated the responses and the one at the beginning of the "
        "updates; only with `async: 1`.",
    ),
    "value_loss": Metric("critic loss", "score squared", "Half of the mean squared error of the critic."),
    "explained_variance": Metric(
        "explained variance",
        "at most 1",
        "Fraction of the variance of the returns that the critic predicts: 1 is all, 0 no more than their mean, "
        "below 0 less than that.",
    ),
    "critic_grad_norm": Metric(
        "critic gradient norm",
        "",
        "The same as `grad_norm`, for the critic; both are the largest of the iteration.",
    ),
    "ppo_epochs": Metric(
        "passes",
        "",
        "Passes over the responses of the iteration; fewer than the setting if `kl.stop` ended them.",
    ),
    "sync_s": Metric(
        "weight transfer time",
        "s",
        "Time to send the policy's weights to a rollout group, if there is one.",
    ),
    "generate_s": Metric("generation time", "s", "Time to generate the responses."),
    "score_s": Metric(
        "scoring time",
        "s",
        "Time that scoring by policy, reference, critic and rewards takes after all responses are generated.",
    ),
    "learn_s": Metric("training time", "s", "Time to update policy and critic."),
    "driver_s": Metric("driver time", "s", "Time that the driver itself computed, without waiting."),
}

LANGUAGE: Columns = {
    **ROW, **_LANGUAGE, **STEP, **_SUPERVISED, **_HELD_OUT, **_ANSWERS, **_ANSWERS_SPEED, **_EVALUATION,
}  # fmt: skip
"""Of language models that are trained on texts, in reading order, as all of these."""
PAIRS: Columns = {**ROW, **_pairs("", ""), **STEP, **_SUPERVISED, **_pairs("eval_", ", held out"), **_EVALUATION}
"""Of reward models that are trained on pairs."""
POLICY: Columns = {**ROW, **STEP, **_POLICY, **_ANSWERS, **_ANSWERS_SPEED, **_EVALUATION}
"""Of a policy with its critic and its rewards."""
