"""What the parent of all test workers imports, once."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: F401
import transformers.integrations.deepspeed
import transformers.models.llama.modeling_llama  # noqa: F401

import training.recipes.sft
import training.recipes.supervised  # noqa: F401
