"""`muster generate`: finds the model and the prompts, and shows the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.cache import cache_folder
from launcher.runs import JOB, METRICS, PATIENCE_S, RunFolder, find, told_as_input
from training import modelfiles
from training.errors import InputError, Problem
from training.storage import Place, is_remote, local_copy, place

SHOWN_PROBLEMS = 20


def answer(
    model: str, prompts: Sequence[str], file: Path | None, limit: int | None, **sampling: Any
) -> list[dict[str, Any]]:
    """Rows of {prompt, response}, with the file's own `answer` or `completion` beside it where it has one."""
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    if file is not None:
        rows += _read(file, limit)
    if not rows:
        raise InputError.of("command line", "no prompt; give --prompt TEXT or --file FILE")
    if not all(prompts):
        raise InputError.of("command line", "a prompt is empty; give it some text", "--prompt")
    path = model_folder(model)
    from training.generate import generate

    responses = generate(path, [row["prompt"] for row in rows], **sampling)
    return [{**row, "response": response} for row, response in zip(rows, responses, strict=True)]


def _read(file: Path, limit: int | None) -> list[dict[str, Any]]:
    if not file.is_file():
        raise InputError.of(str(file), "is a folder; give a JSONL file" if file.is_dir() else "no such file")
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    with file.open("rb") as lines_of_file:
        for number, line in enumerate(lines_of_file, 1):
            if len(rows) == limit or len(problems) == SHOWN_PROBLEMS:
                break
            row = _row(line)
            if row is None:
                message = "expected a JSON object with a text `prompt` that is not empty"
                problems.append(Problem(f"{file}:{number}", "", message))
            else:
                rows.append(row)
    if problems:
        raise InputError(problems)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    return {"prompt": prompt, **_expected(row)} if isinstance(prompt, str) and prompt else None


def _expected(row: Mapping[str, Any]) -> dict[str, Any]:
    return next(({"expected": row[key]} for key in ("answer", "completion") if key in row), {})


def model_folder(text: str, *, rewards: bool = False) -> str:
    """The Hugging Face folder that is meant: a folder itself, the newest model of a run, or of one of its phases (RUN/PHASE).

    `rewards`: a reward model will do.

    Raises InputError if there is none, or of the wrong kind.
    """
    folder = _at_hand(text) if is_remote(text) else Path(text)
    if folder is None:
        return str(local_copy(_newest_model(find(text)), cache_folder()))
    if (folder / "config.json").exists() or modelfiles.is_adapter(folder):
        modelfiles.inspect(folder, classifier=rewards)
        return str(folder)
    run, phase = text, None
    if folder.is_dir() and not (folder / JOB).exists():
        if not ((folder.parent / JOB).exists() and (folder / METRICS).exists()):
            raise InputError.of(
                text, "neither a run nor a model folder (no job.yaml, no config.json, no adapter_config.json)"
            )
        run, phase = str(folder.parent), folder.name
    newest = str(_newest_model(find(run), phase))
    modelfiles.inspect(Path(newest), classifier=rewards)
    return newest


def _at_hand(address: str) -> Path | None:
    """A copy of the model at an address in a bucket; None if there is no model but perhaps a run."""
    folder = place(address, patience_s=PATIENCE_S)
    with told_as_input(address):
        return local_copy(folder, cache_folder()) if "config.json" in folder.children() else None


def _newest_model(run: RunFolder, only: str | None = None) -> Place:
    for phase in reversed(run.job().phases) if only is None else (only,):
        inside = [name for name, size in (run.root / phase).children().items() if size is None]
        if models := [name for name in inside if name == "model" or name.startswith("model-")]:
            return run.root / phase / max(models, key=_step)
    what = "run" if only is None else f"phase {only}"
    raise InputError.of(
        run.address, f"the {what} has no model yet; `muster export {run.address}` makes one from a checkpoint"
    )


def _step(name: str) -> float:
    """Of a model that `muster export` wrote from a checkpoint; the model of the end comes after all of them."""
    step = name.removeprefix("model-")
    return int(step) if step.isdigit() else float("inf") if name == "model" else -1


def printable(text: str) -> str:
    """The text without characters that move a terminal's cursor or worse: a model may say anything."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def lines(answers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in answers:
        yield f"prompt:   {row['prompt'].rstrip()}"
        yield f"response: {printable(row['response'].strip())}"
        if "expected" in row:
            yield f"expected: {str(row['expected']).strip()}"
        yield ""
