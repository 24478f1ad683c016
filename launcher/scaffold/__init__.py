"""`muster init`: a folder with sample data, a tiny model and a job file,
so that a laptop can try everything at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from launcher.scaffold import tiny_model, word_problems
from training.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
JOBS = ("pretrain.yaml", "sft.yaml", "teacher.yaml", "cft.yaml", "reward.yaml", "ppo.yaml")
Tables = dict[str, list[word_problems.Row]]


def write(folder: Path, seed: int = 17, force: bool = False) -> list[str]:
    """Fill `folder` and return lines for the terminal: what is there and what to type next.

    Equal seeds give equal bytes. Raises InputError if `folder` cannot be written or has something in it; with `force`
    files of the same names are written anew and the others stay.
    """
    _refuse_other_contents(folder, force)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tables = {file: word_problems.rows(seed, file) for file in word_problems.TABLES}
        for file, rows in tables.items():
            _write_rows(folder / "data" / file, rows)
        parameters = tiny_model.save_model(folder / "model", _training_text(tables), seed)
        for name in (*JOBS, "README.md"):
            (folder / name).write_text((TEMPLATES / name).read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}; choose a folder that you may write to"
        raise InputError.of(str(error.filename or folder), message) from error
    return _describe(folder, tables, parameters)


def _refuse_other_contents(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError.of(str(folder), "is a file; expected a folder, or a name that is not taken")
    if folder.is_dir() and not force and any(folder.iterdir()):
        raise InputError.of(str(folder), "the folder is not empty; choose another one, or --force to write into it")


def _write_rows(path: Path, rows: list[word_problems.Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _training_text(tables: Tables) -> Iterator[str]:
    """What the tokenizer learns from: every text of the training split of the word problems,
    nothing of the held-out ones."""
    for file, rows in tables.items():
        if (
            word_problems.TABLES[file].split == "train"
            and word_problems.TABLES[file].make is word_problems.word_problem
        ):
            yield from (text for row in rows for text in row.values())


def _describe(folder: Path, tables: Tables, parameters: int) -> list[str]:
    num_rows = sum(map(len, tables.values()))
    return [
        f"{folder} holds",
        f"  data/         {num_rows:,} rows of word problems and sums, generated: {', '.join(tables)}",
        f"  model/        a LLaMA with {parameters / 1e6:.1f} million random weights, and its tokenizer",
        *(f"  {job:<13} a job: reads data/ and model/, writes runs/" for job in JOBS),
        "  README.md     what all of it is",
        "Next:",
        f"  cd {folder}",
        *(f"  muster check {job}" for job in JOBS),
        *(f"  muster run {job}" for job in JOBS),
    ]
