"""Settings of other fine-tuning tools (Transformers, PEFT, TRL, LLaMA-Factory,
DeepSpeed): the name to use here, and what differs."""

from __future__ import annotations

_BATCH = "samples in the whole global batch, which does not change with the number of workers"
_MICRO = (
    "what one worker computes at a time follows from it; micro_batch or micro_tokens changes memory and speed, never "
    "the loss"
)
_DTYPE = "bf16 or fp32, auto by default; master weights are always fp32"
_LENGTH = "tokens of a sample; longer ones are left out and counted, unless data.overlong is truncate"
_WARMUP = "below 1 a fraction of all steps, else a number of steps"
_PRESENT = "the section switches LoRA on"
_FOLDER = "a run is kept in the folder storage/name"

OTHER_NAMES: dict[str, tuple[str, str]] = {
    "adam_beta1": ("phases.NAME.optimizer.betas", "both in one list"),
    "adam_beta2": ("phases.NAME.optimizer.betas", "both in one list"),
    "adam_epsilon": ("phases.NAME.optimizer.eps", ""),
    "attn_implementation": ("model.attention", ""),
    "batch_size": ("phases.NAME.batch", _BATCH),
    "bf16": ("model.dtype", _DTYPE),
    "chat_template": ("phases.NAME.data.template", ""),
    "cliprange": ("phases.NAME.clip_range", ""),
    "cliprange_value": ("phases.NAME.value_clip", ""),
    "cutoff_len": ("phases.NAME.data.max_length", _LENGTH),
    "dataset": ("phases.NAME.data.train", "a file, folder, glob or hub name"),
    "dataset_name": ("phases.NAME.data.train", "a file, folder, glob or hub name"),
    "deepspeed_stage": ("sharding.stage", "0 to 3; it changes memory, never the loss"),
    "eval_steps": ("phases.NAME.eval_every", ""),
    "flash_attn": ("model.attention", ""),
    "fp16": ("model.dtype", f"{_DTYPE}; there is no fp16"),
    "global_batch_size": ("phases.NAME.batch", _BATCH),
    "gradient_accumulation_steps": ("phases.NAME.batch", f"{_BATCH}; {_MICRO}"),
    "init_kl_coef": ("phases.NAME.kl.beta", "what a nat of KL costs, in units of the score"),
    "kl_coef": ("phases.NAME.kl.beta", "what a nat of KL costs, in units of the score"),
    "learning_rate_scheduler": ("phases.NAME.schedule.name", "cosine, linear or constant"),
    "load_in_4bit": ("model.lora.bits", "4"),
    "logging_steps": ("phases.NAME.log_every", ""),
    "lora_alpha": ("model.lora.alpha", _PRESENT),
    "lora_dropout": ("", "adapters have no dropout here"),
    "lora_r": ("model.lora.rank", _PRESENT),
    "lora_rank": ("model.lora.rank", _PRESENT),
    "lora_target": ("model.lora.targets", "all-linear by default"),
    "lora_target_modules": ("model.lora.targets", "all-linear by default"),
    "lr": ("phases.NAME.learning_rate", ""),
    "lr_scheduler_type": ("phases.NAME.schedule.name", "cosine, linear or constant"),
    "max_grad_norm": ("phases.NAME.clip", "null for none"),
    "max_seq_len": ("phases.NAME.data.max_length", _LENGTH),
    "max_seq_length": ("phases.NAME.data.max_length", _LENGTH),
    "micro_batch_size": (
        "phases.NAME.micro_batch",
        "samples that one worker computes at a time; changes memory and speed, never the loss",
    ),
    "model_max_length": ("phases.NAME.data.max_length", _LENGTH),
    "model_name_or_path": ("model.path", "a hub name or a folder"),
    "nproc_per_node": ("resources.workers", "over all machines"),
    "num_epochs": ("phases.NAME.epochs", "or max_steps"),
    "num_gpus": ("resources.workers", "one worker has one GPU; over all machines"),
    "num_ppo_epochs": ("phases.NAME.ppo_epochs", ""),
    "num_train_epochs": ("phases.NAME.epochs", "or max_steps"),
    "output_dir": ("storage", _FOLDER),
    "packing": ("phases.NAME.data.pack", "true by default; changes speed, never the loss"),
    "per_device_eval_batch_size": ("phases.NAME.micro_tokens", "evaluation uses the micro-batches of training"),
    "per_device_train_batch_size": ("phases.NAME.batch", f"{_BATCH}; {_MICRO}"),
    "r": ("model.lora.rank", _PRESENT),
    "report_to": ("track", "tensorboard, wandb, mlflow or a list"),
    "response_length": ("phases.NAME.response_tokens", ""),
    "run_name": ("name", _FOLDER),
    "save_steps": ("phases.NAME.checkpoint.every", ""),
    "save_total_limit": ("phases.NAME.checkpoint.keep", ""),
    "target_modules": ("model.lora.targets", "all-linear by default"),
    "tokenizer_name_or_path": ("model.tokenizer", ""),
    "torch_dtype": ("model.dtype", _DTYPE),
    "train_batch_size": ("phases.NAME.batch", _BATCH),
    "train_file": ("phases.NAME.data.train", "a file, folder, glob or hub name"),
    "train_micro_batch_size_per_gpu": ("phases.NAME.batch", f"{_BATCH}; {_MICRO}"),
    "warmup_ratio": ("phases.NAME.schedule.warmup", _WARMUP),
    "warmup_steps": ("phases.NAME.schedule.warmup", _WARMUP),
    "zero_stage": ("sharding.stage", "0 to 3; it changes memory, never the loss"),
}
"""By the other tools' name: the path in a job file (empty: there is none),
and why the value may be another one (may be empty)."""


def name_here(key: str) -> str:
    """`the name here is phases.NAME.epochs (or max_steps)` for the name of another tool, else nothing."""
    path, differs = OTHER_NAMES.get(key.lower().replace("-", "_"), ("", ""))
    if not path:
        return differs
    return f"the name here is {path}" + (f" ({differs})" if differs else "")
