"""Typed settings of a phase. Free of torch, so that checking a job costs a moment.

Every class is frozen, refuses unknown keys and takes no loose types ("8" is not 8). The string under a field is its
reference text: meaning, unit, special values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Impossible(ValueError):
    """Settings that are right one by one and cannot go together, as (key such as `data.eval`, message)."""

    def __init__(self, problems: Sequence[tuple[str, str]]):
        super().__init__(problems)
        self.problems = list(problems)

    def __str__(self) -> str:
        return "; ".join(message for _, message in self.problems)


class Settings(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Source(Settings):
    """One source of rows."""

    path: str = Field(examples=["data/train.jsonl"])
    """File, folder, glob, or the name of a data set on the Hugging Face hub, also as `owner/name@revision`."""
    weight: PositiveFloat | None = None
    """Share of the samples that come from this source, relative to the other weights. None: every row once an epoch."""
    name: str | None = None
    """Configuration of a hub data set, such as `main`."""
    split: str = "train"
    """Split of a hub data set, or of a folder that DatasetDict.save_to_disk wrote."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; `owner/name@revision` says the same. None: its default branch. The commit that it is when the
    run begins is recorded and used again."""


class BadRows(Settings):
    """How many rows that cannot be used are left out."""

    drop: Annotated[float, Field(gt=0, lt=1)]
    """Largest fraction of all rows. With more of them the data is refused."""


class Data(Settings):
    """Which rows a phase reads and how they become tokens."""

    train: str | Annotated[list[str | Source], Field(min_length=1)] = Field(examples=["data/train.jsonl"])
    """Path, glob, hub name, {path, split, revision}, or a list of them or of {path, weight}."""
    eval: str | Annotated[list[str | Source], Field(min_length=1)] | None = None
    """Held-out rows for the evaluation loss."""
    format: Literal[
        "auto", "text", "prompt_completion", "alpaca", "sharegpt", "messages", "critique", "preference",
        "sharegpt_preference",
    ] = "auto"  # fmt: skip
    """Row format. auto: recognised by the columns."""
    columns: dict[str, str] = {}
    """The data's own names for the format's columns: {prompt: question, completion: answer}."""
    template: str = "auto"
    """Chat template. auto: the tokenizer's own for message formats, none for prompt_completion. tokenizer: the tokenizer's own for prompts
    and completions that are texts, too. none, a built-in name, or a Jinja file."""
    bos: Literal["auto", "none"] = "auto"
    """What plain texts begin with. auto: what the tokenizer puts before a text (BOS), as at inference. none: nothing, as runs had it before there was this setting."""
    turns: Literal["auto", "last", "all"] = "auto"
    """Which answers of a conversation are learned. auto: all, in one sequence; where the chat template rewrites earlier turns, those that it
    leaves as they were, which is often the last alone. last: the last. all: also those that are rewritten later, each in a sequence that ends with
    it. Answers that are not learned are counted."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Longest sample, in tokens."""
    overlong: Literal["drop", "truncate", "split"] = "drop"
    """What happens to longer samples: left out, cut, or (documents) learnt in pieces. It is counted and told."""
    bad_rows: Literal["refuse"] | BadRows = "refuse"
    """What happens to training rows that cannot be used: broken JSON, a missing column, an empty answer, a conversation that the template
    refuses. refuse: the job does not start. {drop: 0.01}: up to this fraction of all rows is left out, counted and listed in bad_rows.jsonl.
    Rows of `eval` are always refused."""
    shuffle: bool = True
    """False: the files' own order."""
    pack: bool = True
    """Put several samples into one row, with attention that never crosses them. Changes speed, never the loss: models that were not found to
    keep samples apart get one sample a row, which is told."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _as_list(cls, given: object) -> object:
        """One source may be written without a list around it."""
        return [given] if isinstance(given, dict) else given


class Lora(Settings):
    """Low-rank adapters on frozen weights (arXiv:2106.09685)."""

    rank: PositiveInt = 16
    """Rank of the added matrices."""
    alpha: PositiveFloat = 32.0
    """The added product counts alpha / rank times."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter, by the ends of their names, such as [q_proj, v_proj]. all-linear: all but the head
    and those that PEFT could not load into a model of this type, which is told."""
    bits: Literal[4] | None = None
    """4: the frozen weights in 4-bit NF4 (QLoRA, arXiv:2305.14314). Needs a GPU and bitsandbytes."""


class Model(Settings):
    """The model that a phase starts from."""

    path: str = Field(examples=["meta-llama/Llama-2-7b-hf"])
    """Hub id or Hugging Face folder, or the folder of a PEFT adapter."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, and of its tokenizer. None: its default branch. The commit that it is when the run begins
    is recorded and used again."""
    lora: Lora | None = None
    """Train adapters instead of the weights. None: all weights."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the computation; master weights are fp32 always. auto: bf16 where the hardware multiplies it, else fp32."""
    attention: Literal[
        "auto", "eager", "sdpa", "sdpa_varlen", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention kernel. auto: flash attention on GPUs that have it installed; on CPUs sdpa_varlen, torch's kernel called for every sample of
    a packed row, unless layers are compiled; else sdpa; eager for models that transformers has no other for. A kernel that a model does not
    have is refused."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """Kernels of norms, rotations and gated layers. auto: Liger's fused ones on GPUs that have the package liger-kernel, for models that it
    knows, unless layers are compiled; else torch's."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: on GPUs that a step would not fit
    into without it, by the figures of `muster plan`."""
    compile: bool = False
    """Compile the layers with torch: for GPUs, CPUs gain little. The first steps take up to a minute longer. Needs a C++ compiler; not at
    ZeRO stage 3, not in PPO."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you trust. `generate`, `eval`, `critique` and `export` ask anew:
    `--trust-remote-code`."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer. None: the model's own."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of `tokenizer`, where that is on the hub."""
    resize_embedding: Literal["never", "auto"] = "never"
    """What happens when the tokenizer has more tokens than the embedding has rows. never: data with such tokens are refused. auto: embedding
    and head grow to the tokenizer's size; the new rows begin as the mean of the others. With LoRA, embedding and head are then trained whole."""


class Schedule(Settings):
    """Learning rate over the steps of a phase."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    warmup: Annotated[float | int, Field(ge=0)] = 0.03
    """Linear warm-up: below 1 a fraction of all steps, else a number of steps."""
    floor: Fraction = 0.1
    """Fraction of the learning rate at which the decay ends."""


class Optimizer(Settings):
    """AdamW (arXiv:1711.05101); no decay on norms, biases and embeddings."""

    name: Literal["adamw"] = "adamw"
    """The only one there is."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """How much of the running means of the gradient and of its square stays at each step."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the mean square before the step is divided by it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Share of a weight that a step takes away, times the learning rate. LLaMA-2 used 0.1 for SFT."""


class Best(Settings):
    """Which checkpoint counts as the best. The phase ends with its model."""

    metric: str = "eval_loss"
    """A name from the evaluation rows of metrics.jsonl."""
    mode: Literal["auto", "min", "max"] = "auto"
    """auto: the smallest loss, the largest of anything else."""

    @property
    def smaller_is_better(self) -> bool:
        return self.mode == "min" or (self.mode == "auto" and self.metric.endswith("loss"))


_DURATION = re.compile(r"([1-9][0-9]{0,6})(s|m|h)")
_UNIT_S = {"s": 1, "m": 60, "h": 3600}


class Checkpointing(Settings):
    """When to save and what to keep."""

    every: int | str = 200
    """Steps between two checkpoints, or a time such as 90s, 10m or 2h: then a checkpoint is saved after the first step that ends when the last
    one is that old, by the driver's clock. The last step is always saved."""
    keep: PositiveInt = 3
    """How many of the newest stay. The best and the only whole one are never deleted."""
    keep_weights: Annotated[int, Field(ge=0)] = 0
    """How many before these keep their weights alone, a third of their size: to generate, evaluate and export from, while the run cannot be
    resumed from them. So does the best, once it is not one of the newest any more. 0: none; the best stays as it was saved."""
    best: Best | None = None
    """Also keep the best by this metric, and end with it."""

    @field_validator("every", mode="before")
    @classmethod
    def _is_steps_or_a_time(cls, every: object) -> object:
        if (type(every) is int and every > 0) or (isinstance(every, str) and _DURATION.fullmatch(every)):
            return every
        got = f'"{every}"' if isinstance(every, str) else json.dumps(every, default=str)
        raise ValueError(f"got {got}, expected steps such as 200, or a time such as 90s, 10m or 2h")

    @property
    def every_s(self) -> int | None:
        """Seconds between two checkpoints, if that is what `every` says."""
        found = _DURATION.fullmatch(str(self.every))
        return int(found[1]) * _UNIT_S[found[2]] if found else None


class Sharding(Settings):
    """How model states are spread over the workers (ZeRO, arXiv:1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing, 1: optimizer states, 2: and gradients, 3: and weights."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: optimizer states (and weights, at stage 3) live in host memory."""


class Resources(Settings):
    """What the workers are."""

    workers: PositiveInt = 1
    """One worker is one process with one GPU (one CPU process where there are none)."""
    min_workers: PositiveInt | None = None
    """May go on with as few, when machines are lost or do not come. None: waits for all."""
    wait_for_machines: PositiveFloat = 600.0
    """Seconds to wait for machines before going on with fewer, or giving up. Machines that others use are waited for without end."""
    hang_after: PositiveFloat = 600.0
    """Seconds without any progress of any worker after which they are restarted."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """auto: 1 where the cluster has GPUs, else 0."""
    threads: Literal["auto"] | PositiveInt = "auto"
    """CPU threads a worker computes with. auto: the node's cores shared by its workers."""
    accelerator: str | None = None
    """Only GPUs of this type, by Ray's name, such as H100."""


class Questions(Settings):
    """Questions that the model answers at every evaluation; the answers are compared with the right ones."""

    data: str = Field(examples=["data/questions.jsonl"])
    """File of rows with a question and its answer."""
    columns: dict[str, str] = {}
    """The data's own names: {question: problem, answer: solution}."""
    limit: PositiveInt | None = None
    """How many rows are taken, from the first on."""
    max_new_tokens: PositiveInt = 256
    """Longest response."""
    samples: PositiveInt = 1
    """Responses to each question."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    batch: PositiveInt = 64
    """Responses that one worker writes at a time. Changes memory and speed, never the responses."""
    verdicts: str | None = None
    """File of rows with question, answer and verdict: the model critiques the answer, its conclusion is compared."""


_STEPS = re.compile(r"([1-9][0-9]{0,17})(?:-([1-9][0-9]{0,17}))?")
_MOST_PROFILED = 20
"""A trace of more steps is too large to look at."""


class Profile(Settings):
    """Where the time of some steps goes: a trace and a table of the first worker of each group."""

    steps: int | str = Field(examples=["10-12"])
    """The first and the last, such as 10-12, or one step such as 10; at most 20. Of PPO: iterations."""

    @field_validator("steps")
    @classmethod
    def _is_a_range(cls, steps: int | str) -> int | str:
        found = _STEPS.fullmatch(str(steps))
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(f'got "{steps}", expected a step such as 10, or the first and the last such as 10-12')
        if (count := last - first + 1) > _MOST_PROFILED:
            raise ValueError(f'got "{steps}" ({count:,} steps), expected at most {_MOST_PROFILED} steps')
        return steps

    @property
    def first(self) -> int:
        return int(str(self.steps).partition("-")[0])

    @property
    def last(self) -> int:
        return int(str(self.steps).rpartition("-")[2])


class Phase(Settings):
    """What every recipe has."""

    recipe: str
    """pretrain, sft, cft, reward or ppo."""
    from_: str | None = Field(default=None, alias="from")
    """What to start from: an earlier phase of this job, a run, or a model folder. None: the phase before, or `model.path` for the first."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root of every random choice: same job, same data, same seed, same curve."""
    model: Model
    """What is trained, and how it computes."""
    data: Data
    """What it learns from."""
    epochs: PositiveFloat | None = None
    """Passes over the data; 1 unless `max_steps` is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; ends early, or goes through the data again."""
    batch: PositiveInt = 64
    """Samples in a global batch. Never changes with the machines."""
    micro_tokens: Literal["auto"] | PositiveInt = "auto"
    """Tokens in a micro-batch of one worker. Changes memory and speed, never the loss. auto: 4,096 or the longest sample on a GPU; on a CPU
    1,024, for adapters and pairs 512."""
    micro_batch: PositiveInt | None = None
    """Samples in a micro-batch, instead of micro_tokens."""
    learning_rate: PositiveFloat = 2.0e-5
    """The highest one, which the warm-up ends with."""
    schedule: Schedule = Schedule()
    """How the learning rate goes up and down."""
    optimizer: Optimizer = Optimizer()
    """How gradients change weights."""
    clip: PositiveFloat | None = 1.0
    """Largest gradient norm. null: no clipping."""
    on_divergence: Literal["stop", "skip"] = "stop"
    """When the loss diverges. skip: go back to the last checkpoint and leave out the batch that did it."""
    loss_limit: PositiveFloat | None = None
    """A loss above it has diverged. None: only one that is no number."""
    log_every: PositiveInt = 1
    """Steps between two lines on the terminal. metrics.jsonl has every step."""
    profile: Profile | None = None
    """Find out where the time goes, for some steps. None: nothing is measured."""
    eval_every: PositiveInt | None = None
    """Steps between two evaluations. None: at the end only, if there is `data.eval` or `eval`."""
    eval_on_start: bool = False
    """Evaluate before the first step, too: what the model could do before."""
    eval: Questions | None = None
    """Evaluation by generated answers."""
    checkpoint: Checkpointing = Checkpointing()
    """When the run is saved, and what is kept."""
    sharding: Sharding = Sharding()
    """What the workers share out among themselves."""
    resources: Resources = Resources()
    """How many workers, and what they wait for."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed settings, laid over what is derived. A clash with what Muster owns is an error."""

    @property
    def save_period(self) -> int | None:
        """A checkpoint is saved every so many steps, whatever the clock says. None: when the clock says so alone.

        The best checkpoint is one of these: a choice among those that the clock made would be another one in every run.
        """
        if self.checkpoint.every_s is None:
            return int(self.checkpoint.every)
        return self.eval_every if self.checkpoint.best is not None else None

    @property
    def step_samples(self) -> int:
        """Samples of the data that a step goes on by."""
        return self.batch

    @property
    def new_tokens(self) -> int:
        """Tokens that the model writes behind a sample."""
        return 0

    @property
    def teams(self) -> list[tuple[tuple[str, ...], Phase]]:
        """Which roles share workers, by groups of workers, and the phase as each group sees it. No roles: all there are."""
        return [((), self)]

    @property
    def num_workers(self) -> int:
        """Of all groups together."""
        return sum(phase.resources.workers for _, phase in self.teams)

    @property
    def starts_from_phase(self) -> bool:
        """Whether `from_` is a phase of the same job: a phase's name is no path."""
        return self.from_ is not None and "/" not in self.from_

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if problems := list(self.combinations()):
            raise Impossible(problems)
        return self

    def eval_metrics(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        of_rows = ("eval_loss",) if self.data.eval is not None else ()
        answers = ("eval_accuracy",) if self.eval is not None else ()
        verdicts = ("eval_verdict_accuracy",) if self.eval is not None and self.eval.verdicts is not None else ()
        return of_rows + answers + verdicts

    def combinations(self) -> Iterator[tuple[str, str]]:
        """(key, message) of settings that cannot go together. A recipe with more of them adds its own."""
        if self.epochs is not None and self.max_steps is not None:
            yield "max_steps", "epochs and max_steps exclude each other; keep one"
        if self.profile is not None and self.max_steps is not None and self.profile.first > self.max_steps:
            yield "profile.steps", f"{self.profile.steps} comes after the last step, {self.max_steps} (max_steps)"
        if self.micro_batch is not None and self.micro_tokens != "auto":
            yield "micro_batch", "micro_tokens and micro_batch exclude each other; keep one"
        if self.batch < self.resources.workers:
            yield (
                "batch",
                f"a batch of {self.batch} samples cannot be dealt to {self.resources.workers} workers; "
                f"choose batch >= {self.resources.workers} or fewer workers",
            )
        if (least := self.resources.min_workers) is not None and least > self.resources.workers:
            yield "resources.min_workers", f"min_workers {least} is more than workers {self.resources.workers}"
        measured = self.eval_metrics()
        if self.checkpoint.best is not None and not measured:
            yield "checkpoint.best", "checkpoint.best needs data.eval or eval to measure on"
        elif self.checkpoint.best is not None and self.checkpoint.best.metric not in measured:
            yield (
                "checkpoint.best.metric",
                f"{self.checkpoint.best.metric} is not measured; this phase measures {', '.join(measured)}",
            )
        if self.checkpoint.best is not None and self.checkpoint.every_s is not None and self.eval_every is None:
            yield (
                "checkpoint.best",
                "with a time in checkpoint.every, the steps to choose the best from must be given: set eval_every, a checkpoint is "
                "saved at each of these evaluations",
            )
        if self.eval_every is not None and not measured:
            yield "eval_every", "eval_every needs data.eval or eval to measure on"
        if self.eval_on_start and not measured:
            yield "eval_on_start", "eval_on_start needs data.eval or eval to measure on"
        if self.eval is not None and self.eval.samples > 1 and self.eval.temperature == 0:
            yield "eval.temperature", "several samples at temperature 0 are the same; choose a temperature, such as 0.7"
        if (lora := self.model.lora) is not None and lora.bits is not None and self.sharding.stage == 3:
            yield "model.lora.bits", "4-bit weights are not sharded: choose sharding.stage 0, 1 or 2, or leave bits out"
        if self.model.compile and lora is not None and lora.bits is not None:
            yield "model.compile", "4-bit weights are not compiled; leave one of the two out"
        if self.model.compile and any(seated.sharding.stage == 3 for _, seated in self.teams):
            yield (
                "model.compile",
                "at ZeRO stage 3 weights are gathered before every module, and compiled code breaks off at each; "
                "choose sharding.stage 0, 1 or 2, or leave compile out",
            )
        if self.model.compile and self.model.kernels == "liger":
            yield (
                "model.kernels",
                "compiled layers fuse the same operations by themselves; leave kernels or compile out",
            )
        if self.data.overlong == "split" and not isinstance(self, Pretrain):
            yield "data.overlong", "only documents (recipe pretrain) can be split; choose drop or truncate"
        if self.sharding.offload != "none" and self.sharding.stage == 0:
            yield "sharding.offload", "there is nothing to offload at stage 0; choose stage 1, 2 or 3"
        if isinstance(self.micro_tokens, int) and self.micro_tokens < self.data.max_length:
            yield (
                "micro_tokens",
                f"micro_tokens {self.micro_tokens} is smaller than data.max_length {self.data.max_length}: the longest "
                f"sample would not fit; choose micro_tokens >= {self.data.max_length}",
            )

    def settings_without_effect(self) -> Iterator[tuple[str, str]]:
        """(key, why) of settings that are not used with the others as they are. A recipe with more of them adds its own."""
        if self.schedule.name == "constant":
            yield "schedule.floor", "the schedule constant does not decay; choose schedule.name cosine or linear"
        if self.eval is not None and self.eval.temperature == 0:
            yield "eval.top_p", "at eval.temperature 0 the likeliest token is always taken; raise the temperature"


class Documents(Data):
    """Which texts a phase reads."""

    overlong: Literal["drop", "truncate", "split"] = "split"


class Pretrain(Phase):
    """Self-supervised learning on text: every token but the first of a document is a target."""

    data: Documents


class SFT(Phase):
    """Supervised fine-tuning: loss on the outputs only. Defaults of LLaMA-2 where it names them (arXiv:2307.09288)."""


class CritiqueSchedule(Schedule):
    """The paper's: cosine to nothing."""

    warmup: Annotated[float | int, Field(ge=0)] = 0.1
    floor: Fraction = 0.0


class CFT(Phase):
    """Critique fine-tuning: loss on the critique only. Defaults of the paper (arXiv:2501.17703)."""

    batch: PositiveInt = 512
    learning_rate: PositiveFloat = 5.0e-6
    schedule: CritiqueSchedule = CritiqueSchedule()


class Reward(Phase):
    """Reward model on pairs, with a scalar head; loss -log sigmoid(chosen - rejected - margin) (arXiv:2203.02155, 2307.09288)."""

    learning_rate: PositiveFloat = 1.0e-5

    def eval_metrics(self) -> tuple[str, ...]:
        names = ("loss", "accuracy", "margin", "reward_mean", "reward_std")
        return tuple(f"eval_{name}" for name in names) if self.data.eval is not None else ()

    def combinations(self) -> Iterator[tuple[str, str]]:
        yield from super().combinations()
        if self.eval is not None:
            yield "eval", "a reward model writes no answers; give held-out pairs as data.eval"
        if self.data.overlong != "drop":
            yield "data.overlong", "a cut answer would be judged by its beginning; pairs can only be dropped"


class ConstantSchedule(Schedule):
    """PPO's: no decay and no warm-up, also where a job gives another part of it."""

    name: Literal["cosine", "linear", "constant"] = "constant"
    warmup: Annotated[float | int, Field(ge=0)] = 0


class KL(Settings):
    """How far the policy may go from where it started."""

    estimator: Literal["k1", "k3"] = "k1"
    """k1: in the reward of every token (arXiv:2203.02155). k3: as a loss."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the penalty: what a nat of KL costs, in units of the score. 0: none."""
    target: PositiveFloat | None = None
    """KL of a response that beta is steered towards (arXiv:1909.08593). None: beta stays."""
    horizon: PositiveInt = 10_000
    """Responses over which beta follows `target`; fewer, the quicker."""
    stop: PositiveFloat | None = None
    """Mean KL a token between old and new policy at which the passes over an iteration end. None: never."""


class RewardSource(Settings):
    """One reward."""

    path: str = Field(examples=["reward"])
    """A phase of this job, a run, a model folder, a Python function (`mypkg.rewards:score` or `file.py:score`), or http(s)://."""
    weight: float = 1.0
    """The rewards are added up with these weights."""
    timeout: PositiveFloat = 60.0
    """Seconds that a function or an endpoint may take for a batch; of an endpoint from the connection to the last byte of its answer."""
    folder: str | None = None
    """Of a function: the folder in which its module, and what that imports, is looked for after all that is installed. None: the folder
    of the job file."""

    @property
    def is_endpoint(self) -> bool:
        return self.path.startswith(("http://", "https://"))

    @property
    def is_function(self) -> bool:
        """Whether it reads `module:name` or `file.py:name`."""
        where, _, name = self.path.rpartition(":")
        return bool(where) and name.isidentifier()

    @property
    def is_model(self) -> bool:
        return not self.is_endpoint and not self.is_function


class Stop(Settings):
    """When a phase ends before its last iteration."""

    reward: float | None = None
    """The mean reward of an iteration has reached it."""
    kl: PositiveFloat | None = None
    """The mean KL of a response to where the policy started has passed it."""


class Prompts(Data):
    """Which prompts a phase answers. `max_length`: of a prompt; longer ones are dropped."""

    overlong: Literal["drop"] = "drop"
    """Longer prompts are left out, counted and told."""
    max_length: PositiveInt = 1024
    """Longest prompt, in tokens; the response comes on top."""


PPO_ROLES = ("policy", "reference", "critic", "reward")
"""What PPO cannot do without. `rollout`, if it has a group, writes the responses in place of the policy."""


class Placement(Settings):
    """Workers that share their processes between roles."""

    roles: Annotated[list[Literal["policy", "reference", "critic", "reward", "rollout"]], Field(min_length=1)]
    """Who sits here. Every role but rollout has to sit somewhere, each once; rollout writes the responses in place of the policy."""
    workers: PositiveInt
    """Of this group."""
    sharding: Sharding | None = None
    """None: the phase's."""


class PPO(Phase):
    """Proximal policy optimisation against a reward (arXiv:1707.06347, 2009.01325, 2203.02155). A step is an iteration."""

    data: Prompts
    reward: str | Annotated[list[str | RewardSource], Field(min_length=1)] = Field(examples=["reward"])
    """A phase of this job, a run, a model folder, a Python function, an endpoint, or a list of them with weights."""
    critic: str | None = None
    """What the critic starts from: an earlier phase, a run or a model folder. None: the first reward that is a model, else the policy."""
    groups: Annotated[list[Placement], Field(min_length=1)] | None = None
    """Who sits where; groups work at the same time. None: all roles in one group of `resources.workers`."""
    rollout_batch: PositiveInt = 64
    """Prompts of an iteration."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt of an iteration."""
    batch: PositiveInt = 64
    """Responses of an update of the weights."""
    response_tokens: PositiveInt = 128
    """Longest response, in tokens. Longer ones are cut off."""
    temperature: PositiveFloat = 1.0
    """At which responses are drawn; 1 is the policy as it is, below 1 the likelier tokens come more often."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability. 1: from all."""
    generation: Literal["batched", "continuous"] = "batched"
    """batched: prompts of like length together, finished rows leave. continuous: the next prompt takes their place (for GPUs). The tokens are the same."""
    generation_batch: PositiveInt = 64
    """Responses that one worker writes at a time, if batched; they are scored while it writes the next. Changes memory and speed, never the responses."""
    async_: Literal[0, 1] = Field(default=0, alias="async")
    """1: while policy and critic learn, a rollout group writes the next responses already, with the policy as it is before. A token then counts
    as much more or less as its probability has changed since, at most twice (arXiv:2505.24298). 0: all take turns."""
    ppo_epochs: PositiveInt = 2
    """Passes over the responses of an iteration."""
    learning_rate: PositiveFloat = 1.0e-6
    """The policy's."""
    schedule: ConstantSchedule = ConstantSchedule()
    critic_learning_rate: PositiveFloat = 9.0e-6
    """The critic's, which follows the same schedule."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """Iterations in which the critic learns alone, its values not held."""
    kl: KL = KL()
    """What holds the policy near to where it started."""
    stop: Stop = Stop()
    """What ends the phase early."""
    gamma: Fraction = 1.0
    """Discount of what comes a token later. 1: none, as is usual for responses."""
    lam: Fraction = 0.95
    """Lambda of GAE (arXiv:1506.02438). 1: what really came, noisy; 0: what the critic expects, biased."""
    clip_range: PositiveFloat = 0.2
    """How far the probability of a token may move in an iteration before it counts no more: to 1 - 0.2 or 1 + 0.2 times what it was."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value may move in an iteration, on the scale of the scores. None: any distance."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, which keeps responses various. 0: none."""
    missing_eos_penalty: float | None = None
    """Score of a response that was cut off. None: whatever the reward says."""
    score_clip: PositiveFloat | None = 10.0
    """Scores are held between minus and plus this before they are learnt from. null: as they are."""
    normalize_scores: bool = False
    """Divide scores by their running standard deviation first: a reward model's scale is arbitrary."""

    @property
    def step_samples(self) -> int:
        return self.rollout_batch

    @property
    def new_tokens(self) -> int:
        return self.response_tokens

    def rounds(self, writers: int) -> int:
        """In how many rounds so many workers write the responses of an iteration; the others score one while the next is written."""
        if self.generation == "continuous":
            return 1
        longest_share = math.ceil(self.rollout_batch * self.samples_per_prompt / writers)
        return math.ceil(longest_share / self.generation_batch)

    @property
    def teams(self) -> list[tuple[tuple[str, ...], Phase]]:
        if self.groups is None:
            return [(PPO_ROLES, self)]
        return [(tuple(group.roles), self._seated(group)) for group in self.groups]

    def _seated(self, group: Placement) -> Phase:
        resources = self.resources.model_copy(update={"workers": group.workers})
        return self.model_copy(update={"resources": resources, "sharding": group.sharding or self.sharding})

    @property
    def shares_base(self) -> bool:
        """Whether roles of a worker that begin with the same weights hold them once: that is what adapters are for. Under
        ZeRO-3, where two engines cannot share parameters, every role has its own."""
        if self.model.resize_embedding == "auto":  # then each role trains an embedding of its own
            return False
        return self.model.lora is not None and self.sharding.stage < 3

    @property
    def rewards(self) -> list[RewardSource]:
        """What is added up to the reward."""
        given = [self.reward] if isinstance(self.reward, str) else self.reward
        return [RewardSource(path=each) if isinstance(each, str) else each for each in given]

    def settings_without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().settings_without_effect()
        if self.kl.target is None:
            yield "kl.horizon", "beta follows no target; set kl.target"

    def combinations(self) -> Iterator[tuple[str, str]]:
        yield from super().combinations()
        if (responses := self.rollout_batch * self.samples_per_prompt) < self.batch:
            yield (
                "batch",
                f"an iteration has {responses} responses (rollout_batch x samples_per_prompt), fewer than the {self.batch} of "
                f"one update; choose batch <= {responses}",
            )
        if self.groups is not None:
            named: list[str] = [role for group in self.groups for role in group.roles]
            wrong = [
                f"{role} is named " + (f"{named.count(role)} times" if role in named else "in none")
                for role in (*PPO_ROLES, "rollout")
                if named.count(role) > 1 or (role in PPO_ROLES and role not in named)
            ]
            if wrong:
                yield "groups", f"each role sits in one group; {', '.join(wrong)}"
            if self.resources.min_workers is not None:
                yield "resources.min_workers", "with `groups` all workers are needed; leave min_workers out"
            most = max(group.workers for group in self.groups)
            if most > min(self.batch, responses):
                yield (
                    "groups",
                    f"{self.batch} responses of an update cannot be dealt to {most} workers; choose fewer or a larger batch",
                )
        if self.async_ and not any(group.roles == ["rollout"] for group in self.groups or ()):
            yield (
                "async",
                "who writes ahead must not wait for the others: async: 1 needs a group of its own for rollout in `groups`, "
                "such as {roles: [rollout], workers: 1}",
            )
        if self.model.compile:
            yield "model.compile", "PPO does not compile its layers yet; leave it out"
        if self.data.eval is not None:
            yield "data.eval", "a policy has no held-out loss; give questions with answers as `eval`"
        if self.on_divergence == "skip":
            yield "on_divergence", "an iteration cannot be left out: the next one's responses come from it; choose stop"
