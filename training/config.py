"""Typed settings of a phase. Free of torch, so that checking a job costs a moment.

Every class is frozen, refuses unknown keys and takes no loose types ("8" is not 8). The string under a field is its
reference text: meaning, unit, special values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class IncompatibleSettings(ValueError):
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
    """A file, a folder, a glob, or the name of a dataset on the Hugging Face hub, also as `owner/name@revision`."""
    weight: PositiveFloat | None = None
    """Share of the samples that come from this source, relative to the other weights. None: every row once per
    epoch."""
    name: str | None = None
    """Configuration of a hub dataset, such as `main`."""
    split: str = "train"
    """Split of a hub dataset, or of a folder written by DatasetDict.save_to_disk."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; the same as `owner/name@revision`. None: the default branch. The run
    records the commit at its start and uses the same commit when it is resumed."""


class BadRows(Settings):
    """How many invalid rows may be left out."""

    drop: Annotated[float, Field(gt=0, lt=1)]
    """Largest fraction of all rows that may be dropped. Data with more invalid rows is refused."""


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
    """Row format. auto: detected from the columns."""
    columns: dict[str, str] = {}
    """Maps the columns of the format to those of the data: {prompt: question, completion: answer}."""
    template: str = "auto"
    """Chat template. auto: the tokenizer's own for conversations, none for prompt_completion. tokenizer: the
    tokenizer's own, also for prompts and completions that are plain texts. Otherwise none, the name of a built-in
    template, or a Jinja file."""
    bos: Literal["auto", "none"] = "auto"
    """What plain texts begin with. auto: the BOS token if the tokenizer adds one, as at inference. none: nothing, as in
    runs from before this setting existed."""
    turns: Literal["auto", "last", "all"] = "auto"
    """Which answers of a conversation are trained on. auto: all of them, in one sequence; if the chat template rewrites
    earlier turns, only those that it leaves unchanged, which is often only the last. last: only the last. all: also
    those that are rewritten later, each in a sequence that ends with it. Answers that are not trained on are
    counted."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Maximum length of a sample, in tokens."""
    overlong: Literal["drop", "truncate", "split"] = "drop"
    """What happens to longer samples: they are dropped, truncated, or (documents only) split into pieces. Their number
    is reported."""
    bad_rows: Literal["refuse"] | BadRows = "refuse"
    """What happens to invalid training rows: broken JSON, a missing column, an empty answer, a conversation that the
    template rejects. refuse: the job does not start. {drop: 0.01}: up to this fraction of all rows is dropped, counted
    and listed in bad_rows.jsonl. Invalid rows of `eval` are always refused."""
    shuffle: bool = True
    """Shuffle the samples in every epoch. false: keep the order of the files."""
    pack: bool = True
    """Pack several samples into one row; attention never crosses from one to another. This changes the speed, never the
    loss. Models that are not known to keep samples apart get one sample per row, with a note."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _as_list(cls, given: object) -> object:
        """One source may be written without a list around it."""
        return [given] if isinstance(given, dict) else given


class Lora(Settings):
    """Low-rank adapters on frozen weights (arXiv:2106.09685)."""

    rank: PositiveInt = 16
    """Rank of the adapter matrices."""
    alpha: PositiveFloat = 32.0
    """The product of the adapter matrices is scaled by alpha / rank."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter, by the ends of their names, such as [q_proj, v_proj]. all-linear: all except
    the head and those that PEFT cannot load into a model of this type; a note names the latter."""
    bits: Literal[4] | None = None
    """4: keep the frozen weights in 4-bit NF4 (QLoRA, arXiv:2305.14314). Needs a GPU and bitsandbytes."""


class Model(Settings):
    """The model that a phase starts from."""

    path: str = Field(examples=["meta-llama/Llama-2-7b-hf"])
    """A hub id, a Hugging Face model folder, or the folder of a PEFT adapter."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, and of its tokenizer. None: the default branch. The run records the
    commit at its start and uses the same commit when it is resumed."""
    lora: Lora | None = None
    """Train adapters instead of the weights. None: train all weights."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of the computation; the master weights are always fp32. auto: bf16 if the hardware multiplies it,
    otherwise fp32."""
    attention: Literal[
        "auto", "eager", "sdpa", "sdpa_varlen", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention kernel. auto: flash attention on GPUs where it is installed; on CPUs sdpa_varlen, which calls torch's
    kernel for each sample of a packed row, unless layers are compiled; otherwise sdpa; eager for models for which
    transformers has no other kernel. A kernel that a model does not support is refused."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """Kernels of norms, rotary embeddings and gated layers. auto: Liger's fused kernels on GPUs if liger-kernel is
    installed and supports the model, unless layers are compiled; otherwise torch's."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. This saves memory and takes about a third more time. auto: on GPUs,
    if `muster plan` predicts that a step does not fit without it."""
    compile: bool = False
    """Compile the layers with torch.compile. Worthwhile on GPUs; CPUs gain little. The first steps take up to a minute
    longer. Needs a C++ compiler. Not available at ZeRO stage 3 or in PPO."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use this only for models that you trust. `generate`, `eval`,
    `critique` and `export` need their own option, `--trust-remote-code`."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer. None: the tokenizer of the model."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of `tokenizer`, if it is on the hub."""
    resize_embedding: Literal["never", "auto"] = "never"
    """What happens if the tokenizer has more tokens than the embedding has rows. never: data with such tokens is
    refused. auto: the embedding and the head grow to the tokenizer's size; new rows are initialized to the mean of the
    others. With LoRA, the embedding and the head are then fully trained."""


class Schedule(Settings):
    """Learning rate over the steps of a phase."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    warmup: Annotated[float | int, Field(ge=0)] = 0.03
    """Linear warmup. Below 1: a fraction of all steps; otherwise a number of steps."""
    floor: Fraction = 0.1
    """The decay ends at this fraction of the learning rate."""


class Optimizer(Settings):
    """AdamW (arXiv:1711.05101). Norms, biases and embeddings are not decayed."""

    name: Literal["adamw"] = "adamw"
    """The optimizer. There is only one."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay rates of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the update, for numerical stability."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; each step multiplies the weights by 1 - learning rate x weight_decay. LLaMA-2 used 0.1 for SFT."""


class Best(Settings):
    """How the best checkpoint is chosen. The phase ends with its model."""

    metric: str = "eval_loss"
    """A metric of the evaluation rows in metrics.jsonl."""
    mode: Literal["auto", "min", "max"] = "auto"
    """auto: the smallest value of a loss, the largest of any other metric."""

    @property
    def smaller_is_better(self) -> bool:
        return self.mode == "min" or (self.mode == "auto" and self.metric.endswith("loss"))


_DURATION = re.compile(r"([1-9][0-9]{0,6})(s|m|h)")
_UNIT_S = {"s": 1, "m": 60, "h": 3600}


class Checkpointing(Settings):
    """When checkpoints are saved and which are kept."""

    every: int | str = 200
    """Steps between two checkpoints, or a time such as 90s, 10m or 2h: a checkpoint is then saved after the first step
    that ends when the last checkpoint is that old. The last step is always saved."""
    keep: PositiveInt = 3
    """How many of the newest checkpoints are kept. The best one and the only complete one are never deleted."""
    keep_weights: Annotated[int, Field(ge=0)] = 0
    """How many earlier checkpoints keep only their weights, a third of the size. They can be used by generate, eval and
    export, but a run cannot be resumed from them. The same happens to the best checkpoint when it is no longer one of
    the newest. 0: none, and the best checkpoint stays complete."""
    best: Best | None = None
    """Also keep the best checkpoint by this metric, and end the phase with its model."""

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
    """How model states are partitioned over the workers (ZeRO, arXiv:1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 2
    """What is partitioned. 0: nothing. 1: optimizer states. 2: also gradients. 3: also weights."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: keep optimizer states (and weights, at stage 3) in host memory."""


class Resources(Settings):
    """Number and kind of the workers."""

    workers: PositiveInt = 1
    """Number of workers. A worker is a process with one GPU, or a CPU process if there are no GPUs."""
    min_workers: PositiveInt | None = None
    """Continue with as few as this many workers if machines are lost or not available. None: always wait for all."""
    wait_for_machines: PositiveFloat = 600.0
    """Seconds to wait for machines before the run continues with fewer workers, or stops. The run waits without limit
    for machines that other jobs use."""
    hang_after: PositiveFloat = 600.0
    """If no worker makes progress for this many seconds, all workers are restarted."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """auto: 1 if the cluster has GPUs, otherwise 0."""
    threads: Literal["auto"] | PositiveInt = "auto"
    """CPU threads per worker. auto: the cores of the node divided by the number of its workers."""
    accelerator: str | None = None
    """Use only GPUs of this type, by Ray's name, such as H100."""


class Questions(Settings):
    """Questions that the model answers at every evaluation. The answers are compared with the expected ones."""

    data: str = Field(examples=["data/questions.jsonl"])
    """File with a question and its answer in each row."""
    columns: dict[str, str] = {}
    """Maps the expected columns to those of the data: {question: problem, answer: solution}."""
    limit: PositiveInt | None = None
    """Use only this many rows, from the beginning."""
    max_new_tokens: PositiveInt = 256
    """Maximum length of a response, in tokens."""
    samples: PositiveInt = 1
    """Responses per question."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature. 0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together have this probability."""
    batch: PositiveInt = 64
    """Responses that a worker generates at the same time. This changes memory and speed, never the responses."""
    verdicts: str | None = None
    """File with question, answer and verdict in each row. The model criticizes the answer, and its conclusion is
    compared with the verdict."""


_STEPS = re.compile(r"([1-9][0-9]{0,17})(?:-([1-9][0-9]{0,17}))?")
_MOST_PROFILED = 20
"""A trace of more steps is too large to look at."""


class Profile(Settings):
    """Profile some steps: a trace and a table for the first worker of each group."""

    steps: int | str = Field(examples=["10-12"])
    """The first and the last step, such as 10-12, or a single step such as 10; at most 20. For PPO: iterations."""

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


@dataclass(frozen=True)
class Rollout:
    """How a step goes that begins with responses of the model: what its time and memory depend on."""

    responses: int
    """Responses of a step."""
    batch: int
    """Responses that one worker writes at a time, unless it batches continuously."""
    continuous: bool
    """Whether the next prompt takes the place of a finished response at once."""
    ahead: bool
    """Whether the responses of the next step are written while the model learns from these."""
    updates: int
    """Updates of the weights in a step."""

    def rounds(self, writers: int) -> int:
        """In how many rounds so many workers write the responses of a step.

        The others score one round while the next is written.
        """
        if self.continuous:
            return 1
        return math.ceil(math.ceil(self.responses / writers) / self.batch)


class Phase(Settings):
    """What every recipe has."""

    recipe: str
    """pretrain, sft, cft, reward or ppo."""
    from_: str | None = Field(default=None, alias="from")
    """What the phase starts from: an earlier phase of this job, a run, or a model folder. None: the previous phase, or
    `model.path` for the first one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root seed of all random choices. The same job, data and seed give the same loss curve."""
    model: Model
    """The model and how it computes."""
    data: Data
    """The data."""
    epochs: PositiveFloat | None = None
    """Passes over the data; 1 unless `max_steps` is given."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps. The phase ends within an epoch or repeats the data, as needed."""
    batch: PositiveInt = 64
    """Samples in a global batch. It does not depend on the number of workers."""
    micro_tokens: Literal["auto"] | PositiveInt = "auto"
    """Tokens in a micro-batch of one worker. This changes memory and speed, never the loss. auto: 4,096 or the longest
    sample on a GPU; on a CPU 1,024, for adapters and pairs 512."""
    micro_batch: PositiveInt | None = None
    """Samples in a micro-batch, instead of micro_tokens."""
    learning_rate: PositiveFloat = 2.0e-5
    """Peak learning rate, reached at the end of the warmup."""
    schedule: Schedule = Schedule()
    """Warmup and decay of the learning rate."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""
    clip: PositiveFloat | None = 1.0
    """Gradients are clipped to this norm. null: no clipping."""
    on_divergence: Literal["stop", "skip"] = "stop"
    """What happens when the loss diverges. stop: the run fails. skip: go back to the last checkpoint and skip the batch
    that caused it."""
    loss_limit: PositiveFloat | None = None
    """A loss above this value counts as diverged. None: only a loss that is not a finite number."""
    log_every: PositiveInt = 1
    """Steps between two lines on the terminal. metrics.jsonl has every step."""
    profile: Profile | None = None
    """Profile some steps. None: no profile."""
    eval_every: PositiveInt | None = None
    """Steps between two evaluations. None: evaluate only at the end, if there is `data.eval` or `eval`."""
    eval_on_start: bool = False
    """Also evaluate before the first step."""
    eval: Questions | None = None
    """Evaluation by generated answers."""
    checkpoint: Checkpointing = Checkpointing()
    """When checkpoints are saved, and which are kept."""
    sharding: Sharding = Sharding()
    """What the workers partition among themselves."""
    resources: Resources = Resources()
    """Number and kind of the workers."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed settings that override the derived ones. Settings that Muster controls are refused."""

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
    def sequences_per_sample(self) -> int:
        """Sequences that a sample consists of; they lie in one row."""
        return 1

    @property
    def max_row(self) -> int:
        """Tokens of the longest sample that the settings allow, with what the model writes behind it."""
        return self.sequences_per_sample * self.data.max_length + self.new_tokens

    @property
    def target_share(self) -> float:
        """Share of the tokens that a loss is computed at, where nothing is known of the data."""
        return 1.0

    @property
    def rollout(self) -> Rollout | None:
        """How the model writes the responses that it learns from. None: it learns from the data's."""
        return None

    @property
    def step_sequences(self) -> int:
        """Samples of a step; a prompt counts once for each of its responses."""
        return self.step_samples if self.rollout is None else self.rollout.responses

    @property
    def rewards(self) -> list[RewardSource]:
        """What scores the responses of the model; their scores are added up."""
        return []

    @property
    def reward_keys(self) -> list[tuple[str | int, ...]]:
        """Where the path of each of `rewards` stands in the settings."""
        return []

    @property
    def named_models(self) -> dict[str, str]:
        """Models that settings beside `model` and the rewards name: a phase of this job, a run or a model folder, by
        the key of the setting."""
        return {}

    @property
    def critic_start(self) -> str | None:
        """The model that the critic starts from: the named one, else the first reward that is a model.
        None: the model of the phase."""
        reward = next((source.path for source in self.rewards if source.is_model), None)
        return self.named_models.get("critic", reward)

    def with_models(self, named: Mapping[str, str], rewards: list[RewardSource]) -> Self:
        """The phase with other `named_models` and `rewards`."""
        return self.model_copy(update=dict(named))

    @property
    def has_sized_groups(self) -> bool:
        """Whether groups of workers have sizes of their own, in place of `resources.workers`."""
        return False

    def resized(self, workers: int) -> dict[str, Any]:
        """The settings that give the phase so many workers, as nearly as groups can keep their proportions."""
        return {"resources": self.resources.model_copy(update={"workers": workers, "min_workers": None})}

    def resharded(self, sharding: Sharding) -> dict[str, Any]:
        """The settings that give all workers this sharding."""
        return {"sharding": sharding}

    @property
    def memory_counts(self) -> dict[str, int]:
        """Settings of the recipe that can be made smaller to save memory, and change nothing else but the speed."""
        return {}

    @property
    def placements(self) -> list[tuple[tuple[str, ...], Phase]]:
        """Which roles share workers, by groups of workers, and the phase as each group sees it.
        No roles: all there are."""
        return [((), self)]

    @property
    def num_workers(self) -> int:
        """Of all groups together."""
        return sum(phase.resources.workers for _, phase in self.placements)

    @property
    def starts_from_phase(self) -> bool:
        """Whether `from_` is a phase of the same job: a phase's name is no path."""
        return self.from_ is not None and "/" not in self.from_

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if problems := list(self.combinations()):
            raise IncompatibleSettings(problems)
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
                "with a time in checkpoint.every, the steps to choose the best from must be given: set eval_every, a "
                "checkpoint is saved at each of these evaluations",
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
        if self.model.compile and any(seated.sharding.stage == 3 for _, seated in self.placements):
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
        if self.data.overlong == "split" and not isinstance(self.data, Documents):
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
        """(key, why) of settings that are not used with the others as they are.
        A recipe with more of them adds its own."""
        if self.schedule.name == "constant":
            yield "schedule.floor", "the schedule constant does not decay; choose schedule.name cosine or linear"
        if self.eval is not None and self.eval.temperature == 0:
            yield "eval.top_p", "at eval.temperature 0 the likeliest token is always taken; raise the temperature"


class Documents(Data):
    """Which texts a phase reads."""

    overlong: Literal["drop", "truncate", "split"] = "split"


class Pretrain(Phase):
    """Self-supervised learning on text: every token of a document except the first is a target."""

    data: Documents


_OUTPUT_SHARE = 0.75
"""Of the tokens of a sample; the rest are its prompt."""


class SFT(Phase):
    """Supervised fine-tuning: the loss is on the outputs only. The defaults are those of LLaMA-2 where that paper gives
    them (arXiv:2307.09288)."""

    @property
    def target_share(self) -> float:
        return _OUTPUT_SHARE


class CritiqueSchedule(Schedule):
    """The schedule of the paper: a cosine that ends at 0."""

    warmup: Annotated[float | int, Field(ge=0)] = 0.1
    floor: Fraction = 0.0


class CFT(Phase):
    """Critique fine-tuning: the loss is on the critique only. The defaults are those of the paper
    (arXiv:2501.17703)."""

    batch: PositiveInt = 512
    learning_rate: PositiveFloat = 5.0e-6
    schedule: CritiqueSchedule = CritiqueSchedule()

    @property
    def target_share(self) -> float:
        return _OUTPUT_SHARE


class Reward(Phase):
    """Reward model with a scalar head, trained on pairs; the loss is -log sigmoid(chosen - rejected - margin)
    (arXiv:2203.02155, 2307.09288)."""

    learning_rate: PositiveFloat = 1.0e-5

    @property
    def sequences_per_sample(self) -> int:
        return 2

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
    """The schedule of PPO: no decay and no warmup, unless the job sets them."""

    name: Literal["cosine", "linear", "constant"] = "constant"
    warmup: Annotated[float | int, Field(ge=0)] = 0


class KL(Settings):
    """How far the policy may move from where it started."""

    estimator: Literal["k1", "k3"] = "k1"
    """k1: a penalty in the reward of each token (arXiv:2203.02155). k3: a term of the loss."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the penalty: units of the score per nat of KL. 0: no penalty."""
    target: PositiveFloat | None = None
    """Target KL per response; beta is adapted towards it (arXiv:1909.08593). None: beta is constant."""
    horizon: PositiveInt = 10_000
    """Number of responses over which beta adapts to `target`. A smaller number adapts faster."""
    stop: PositiveFloat | None = None
    """End the passes over an iteration when the mean KL per token between the old and the new policy exceeds this.
    None: never."""


class RewardSource(Settings):
    """One reward."""

    path: str = Field(examples=["reward"])
    """A phase of this job, a run, a model folder, a Python function (`mypkg.rewards:score` or `file.py:score`), or an
    endpoint (http:// or https://)."""
    weight: float = 1.0
    """Weight of this reward in the sum of all rewards."""
    timeout: PositiveFloat = 60.0
    """Seconds that a function or an endpoint may take for a batch; for an endpoint, from the connection to the last
    byte of its reply."""
    folder: str | None = None
    """For a function: the folder in which its module and the modules that it imports are found, after all installed
    ones. None: the folder of the job file."""

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
    """End when the mean reward of an iteration reaches this value."""
    kl: PositiveFloat | None = None
    """End when the mean KL per response, from where the policy started, exceeds this value."""


class Prompts(Data):
    """Which prompts a phase answers. `max_length` applies to the prompt; longer prompts are dropped."""

    overlong: Literal["drop"] = "drop"
    """Longer prompts are dropped; their number is reported."""
    max_length: PositiveInt = 1024
    """Maximum length of a prompt, in tokens, without the response."""


PPO_ROLES = ("policy", "reference", "critic", "reward")
"""What PPO cannot do without. `rollout`, if it has a group, writes the responses in place of the policy."""


class Placement(Settings):
    """A group of workers, whose processes share one or more roles."""

    roles: Annotated[list[Literal["policy", "reference", "critic", "reward", "rollout"]], Field(min_length=1)]
    """Roles of this group. Every role except rollout must be in exactly one group. rollout generates the responses in
    place of the policy."""
    workers: PositiveInt
    """Number of workers in this group."""
    sharding: Sharding | None = None
    """ZeRO settings of this group. None: those of the phase."""


class PPO(Phase):
    """Proximal policy optimization with a reward (arXiv:1707.06347, 2009.01325, 2203.02155). A step is an iteration."""

    data: Prompts
    reward: str | Annotated[list[str | RewardSource], Field(min_length=1)] = Field(examples=["reward"])
    """A phase of this job, a run, a model folder, a Python function, an endpoint, or a list of them with weights."""
    critic: str | None = None
    """What the critic starts from: an earlier phase, a run or a model folder. None: the first reward that is a model,
    otherwise the policy."""
    groups: Annotated[list[Placement], Field(min_length=1)] | None = None
    """Placement of the roles in groups of workers that run concurrently. None: all roles in one group of
    `resources.workers`."""
    rollout_batch: PositiveInt = 64
    """Prompts per iteration."""
    samples_per_prompt: PositiveInt = 1
    """Responses per prompt in an iteration."""
    batch: PositiveInt = 64
    """Responses per update of the weights."""
    response_tokens: PositiveInt = 128
    """Maximum length of a response, in tokens. Longer ones are cut off."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. 1 samples from the policy itself; below 1, likely tokens become likelier."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together have this probability. 1: from all tokens."""
    generation: Literal["batched", "continuous"] = "batched"
    """batched: prompts of similar length are generated together, and finished rows leave the batch. continuous: the
    next prompt takes their place (for GPUs). The tokens are the same."""
    generation_batch: PositiveInt = 64
    """Responses that a worker generates at the same time, if batched; they are scored while the next ones are
    generated. This changes memory and speed, never the responses."""
    async_: Literal[0, 1] = Field(default=0, alias="async")
    """1: while policy and critic are trained, a rollout group already generates the next responses, with the weights
    before the update. Each token is then weighted by how much its probability has changed since, at most twofold
    (arXiv:2505.24298). 0: generation and training alternate."""
    ppo_epochs: PositiveInt = 2
    """Passes over the responses of an iteration."""
    learning_rate: PositiveFloat = 1.0e-6
    """Learning rate of the policy."""
    schedule: ConstantSchedule = ConstantSchedule()
    critic_learning_rate: PositiveFloat = 9.0e-6
    """Learning rate of the critic, which follows the same schedule."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """Iterations in which only the critic is trained, without clipping of its values."""
    kl: KL = KL()
    """Keeps the policy close to where it started."""
    stop: Stop = Stop()
    """Conditions that end the phase early."""
    gamma: Fraction = 1.0
    """Discount per token. 1: no discount, as is usual for responses."""
    lam: Fraction = 0.95
    """Lambda of GAE (arXiv:1506.02438). 1: the observed returns, unbiased but noisy. 0: one-step estimates of the
    critic, biased."""
    clip_range: PositiveFloat = 0.2
    """Clip range of the probability ratio: beyond 1 - clip_range or 1 + clip_range, a token no longer contributes."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value may move in an iteration, on the scale of the scores. None: no clipping."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, which keeps responses diverse. 0: no bonus."""
    missing_eos_penalty: float | None = None
    """Score of a response that was cut off. None: the score that the reward gives it."""
    score_clip: PositiveFloat | None = 10.0
    """Scores are clipped to plus or minus this value. null: no clipping."""
    normalize_scores: bool = False
    """First divide the scores by their running standard deviation. Useful because the scale of a reward model is
    arbitrary."""

    @property
    def step_samples(self) -> int:
        return self.rollout_batch

    @property
    def new_tokens(self) -> int:
        return self.response_tokens

    @property
    def target_share(self) -> float:
        return self.new_tokens / self.max_row

    @property
    def rollout(self) -> Rollout:
        responses = self.rollout_batch * self.samples_per_prompt
        return Rollout(
            responses=responses,
            batch=self.generation_batch,
            continuous=self.generation == "continuous",
            ahead=bool(self.async_),
            updates=math.ceil(responses / self.batch) * self.ppo_epochs,
        )

    @property
    def memory_counts(self) -> dict[str, int]:
        return {} if self.rollout.continuous else {"generation_batch": self.generation_batch}

    @property
    def placements(self) -> list[tuple[tuple[str, ...], Phase]]:
        if self.groups is None:
            return [(PPO_ROLES, self)]
        return [(tuple(group.roles), self._seated(group)) for group in self.groups]

    @property
    def has_sized_groups(self) -> bool:
        return self.groups is not None

    def resized(self, workers: int) -> dict[str, Any]:
        if self.groups is None:
            return super().resized(workers)
        counts = [max(1, round(group.workers * workers / self.num_workers)) for group in self.groups]
        sized = zip(self.groups, counts, strict=True)
        return {"groups": [group.model_copy(update={"workers": count}) for group, count in sized]}

    def resharded(self, sharding: Sharding) -> dict[str, Any]:
        groups = self.groups and [group.model_copy(update={"sharding": sharding}) for group in self.groups]
        return {"sharding": sharding, "groups": groups}

    def _seated(self, group: Placement) -> Phase:
        resources = self.resources.model_copy(update={"workers": group.workers})
        return self.model_copy(update={"resources": resources, "sharding": group.sharding or self.sharding})

    @property
    def shares_base(self) -> bool:
        """Whether roles of a worker that begin with the same weights hold them once: that is what adapters are for.
        Under ZeRO-3, where two engines cannot share parameters, every role has its own."""
        if self.model.resize_embedding == "auto":  # then each role trains an embedding of its own
            return False
        return self.model.lora is not None and self.sharding.stage < 3

    @property
    def rewards(self) -> list[RewardSource]:
        given = [self.reward] if isinstance(self.reward, str) else self.reward
        return [RewardSource(path=each) if isinstance(each, str) else each for each in given]

    @property
    def reward_keys(self) -> list[tuple[str | int, ...]]:
        if isinstance(self.reward, str):
            return [("reward",)]
        return [
            ("reward", index) if isinstance(each, str) else ("reward", index, "path")
            for index, each in enumerate(self.reward)
        ]

    @property
    def named_models(self) -> dict[str, str]:
        return {"critic": self.critic} if self.critic else {}

    def with_models(self, named: Mapping[str, str], rewards: list[RewardSource]) -> Self:
        return self.model_copy(update={**named, "reward": rewards})

    def settings_without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().settings_without_effect()
        if self.kl.target is None:
            yield "kl.horizon", "beta follows no target; set kl.target"

    def combinations(self) -> Iterator[tuple[str, str]]:
        yield from super().combinations()
        if (responses := self.rollout_batch * self.samples_per_prompt) < self.batch:
            yield (
                "batch",
                f"an iteration has {responses} responses (rollout_batch x samples_per_prompt), fewer than the "
                f"{self.batch} of one update; choose batch <= {responses}",
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
                    f"{self.batch} responses of an update cannot be dealt to {most} workers; choose fewer or a larger "
                    "batch",
                )
        if self.async_ and not any(group.roles == ["rollout"] for group in self.groups or ()):
            yield (
                "async",
                "who writes ahead must not wait for the others: async: 1 needs a group of its own for rollout in "
                "`groups`, such as {roles: [rollout], workers: 1}",
            )
        if self.model.compile:
            yield "model.compile", "PPO does not compile its layers yet; leave it out"
        if self.data.eval is not None:
            yield "data.eval", "a policy has no held-out loss; give questions with answers as `eval`"
        if self.on_divergence == "skip":
            yield "on_divergence", "an iteration cannot be left out: the next one's responses come from it; choose stop"
