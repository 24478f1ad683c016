"""One side of the benchmark `data`, in a process of its own: rows of prompt and completion to tokens,
by Muster or by datasets.map.

Prints one JSON line when the data are open a second time: {"rows", "cold_s", "warm_s"}. Both sides tokenise the prompt
and the whole apart, which is how the prompt's own tokens are known, and mask the prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from training.config import Data
from training.data.prepare import prepare

PROCESSES = 2
IGNORED = -100


def with_muster(model: Path, rows: Path, cache: Path) -> Any:
    """The token store."""
    from training.data.files import expand
    from training.recipes import RECIPES

    data = Data(train=str(rows), template="none", max_length=1 << 20)
    return prepare(expand(data.train, rows.parent), data, RECIPES["sft"].formats, str(model), cache)


def with_datasets(model: Path, rows: Path, cache: Path) -> Any:
    """A data set of input_ids and labels."""
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
    settings = {"tokenizer": AutoTokenizer.from_pretrained(model)}
    return loaded.map(
        tokenised, batched=True, num_proc=PROCESSES, remove_columns=loaded.column_names, fn_kwargs=settings
    )


def tokenised(batch: dict[str, Any], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Prompt, completion and EOS as one text; the prompt is masked."""
    wholes = [prompt + completion for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)]
    prompts = tokenizer(batch["prompt"], add_special_tokens=False)["input_ids"]
    ids = [[*whole, tokenizer.eos_token_id] for whole in tokenizer(wholes, add_special_tokens=False)["input_ids"]]
    labels = [[IGNORED] * len(prompt) + whole[len(prompt) :] for prompt, whole in zip(prompts, ids, strict=True)]
    return {"input_ids": ids, "labels": labels}


SIDES: dict[str, Callable[[Path, Path, Path], Sized]] = {"muster": with_muster, "datasets": with_datasets}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    for name in ("model", "rows", "cache"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args(arguments)
    if given.side == "datasets":
        import datasets  # noqa: F401  (imports are on no side's clock)
    else:
        pass

    times = []
    for _ in range(2):
        began = time.perf_counter()
        opened = SIDES[given.side](given.model, given.rows, given.cache)
        times.append(time.perf_counter() - began)
    print(json.dumps({"rows": len(opened), "cold_s": times[0], "warm_s": times[1]}), flush=True)


if __name__ == "__main__":
    main()
