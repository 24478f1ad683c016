"""`muster generate`: responses to prompts, all of them over workers, or one after the other as they are
generated."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launcher.inference import evaluate, model_lookup, prompts
from launcher.inference.prompts import Given
from launcher.process import output
from launcher.process.terminal import Typewriter, printable
from launcher.runfolder import run_folder
from launcher.runfolder.small_files import SmallFiles
from training.data.row_errors import RowError
from training.errors import InputError, Problem

_ANSWER_S = 24 * 3600.0
_TOLD_EVERY_S = 10.0
Row = dict[str, Any]
_NO_RESPONSES = "exists and is not a file of responses; choose a different --out"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line asks for."""

    model: str
    phase: str | None
    step: int | None
    prompts: Sequence[str]
    file: Path | None
    limit: int | None
    out: Path | None
    chat: bool | None
    """None: as the model has learnt."""
    max_new_tokens: int
    temperature: float
    top_p: float
    samples: int
    seed: int
    batch: int
    workers: int
    as_json: bool
    trust_remote_code: bool = False

    @property
    def template(self) -> str:
        return {None: "auto", True: "chat", False: "plain"}[self.chat]

    @property
    def loading(self) -> evaluate.Loading:
        return evaluate.Loading(self.template, self.workers, self.trust_remote_code)

    @property
    def sampling(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}

    @property
    def one_by_one(self) -> bool:
        """Whether a response can be said while it is drawn."""
        return not (self.as_json or self.out or self.samples > 1 or self.workers > 1)


def generate(plan: Plan) -> Iterable[Row] | Row:
    """The responses as they come, or where they were written to. Those
    that were said while they were drawn are not among them."""
    _refuse(plan)
    if not plan.prompts and plan.file is None:
        return _from_stdin(plan)
    given = prompts.given(plan.prompts, plan.file, plan.limit)
    model = model_lookup.found(plan.model, phase=plan.phase, step=plan.step, trust_remote_code=plan.trust_remote_code)
    if len(given) == 1 and plan.one_by_one and sys.stdout.isatty():
        _say_one(plan, model.folder, given[0])
        return []
    return _in_batches(plan, model, given)


def _refuse(plan: Plan) -> None:
    if plan.samples > 1 and plan.temperature == 0:
        raise InputError.of("--temperature", "several samples at temperature 0 are the same; choose one, such as 0.7")
    evaluate.refuse_unused_top_p(plan.temperature, plan.top_p)
    if plan.limit is not None and plan.file is None:
        raise InputError.of("--limit", "needs --file")
    if plan.out is None:
        return
    if plan.out.exists() and not plan.out.is_file():
        raise InputError.of(str(plan.out), "is not a file; set --out to a file, or omit it to print the responses")
    if plan.file is not None and plan.out.exists() and plan.out.resolve() == plan.file.resolve():
        raise InputError.of(str(plan.out), "is the file with the prompts; choose a different --out")
    if not plan.out.absolute().parent.is_dir():
        raise InputError.of(
            str(plan.out), f"the folder {plan.out.parent} does not exist; create it, or choose a different --out"
        )


# -- one by one --------------------------------------------------------------------------------------------------------


def _from_stdin(plan: Plan) -> Iterable[Row] | Row:
    """A conversation with whoever sits at the terminal, or the responses to lines that come from elsewhere."""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        _refuse_for_chat(plan)
    model = model_lookup.found(plan.model, phase=plan.phase, step=plan.step, trust_remote_code=plan.trust_remote_code)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if at_terminal:
        from launcher.inference import chat

        chat.converse(_speaker(plan, model.folder), model.name, _settings(plan), plan.seed)
        return []
    lines = prompts.typed(sys.stdin or ())
    first = next(lines, None)
    if first is None:
        message = "no prompt: the standard input is empty; write lines to it, or use --prompt TEXT or --file FILE"
        raise InputError.of("command line", message)
    given = itertools.chain([first], lines)
    if not plan.one_by_one:
        return _in_batches(plan, model, list(given))
    speaker = _speaker(plan, model.folder)
    for number, one in enumerate(given):
        _say(plan, speaker, one, number)
    return []


def _refuse_for_chat(plan: Plan) -> None:
    options = {"--workers": plan.workers > 1, "--out": plan.out, "--samples": plan.samples > 1, "--json": plan.as_json}
    if wrong := [option for option, is_given in options.items() if is_given]:
        message = (
            "a chat in the terminal has one worker and one response at a time; give prompts with --prompt or --file"
        )
        raise InputError.of(wrong[0], message)


def _say_one(plan: Plan, folder: str, given: Given) -> None:
    speaker = _speaker(plan, folder)
    print(f"prompt:   {_shown(given.row)}\nresponse: ", end="", flush=True)
    _say(plan, speaker, given, 0)
    for line in _expected(given.row):
        print(line)


def _say(plan: Plan, speaker: Any, given: Given, number: int) -> None:
    from training.evaluation.streaming import key_of, respond

    try:
        respond(speaker, given.prompt, key_of(plan.seed, number), _settings(plan), Typewriter().say)
    except RowError as error:
        raise InputError.of(given.where, str(error)) from error
    finally:
        print(flush=True)


def _speaker(plan: Plan, folder: str) -> Any:
    from training.evaluation.evaluator import TextGenerator

    return TextGenerator(folder, plan.template, trust_remote_code=plan.trust_remote_code)


def _settings(plan: Plan) -> Any:
    from training.generation.sampling import Sampling

    return Sampling(**plan.sampling)


# -- all of them -------------------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """One response that is to be written."""

    number: int
    sample: int
    ids: list[int]


def _in_batches(plan: Plan, model: model_lookup.Found, given: Sequence[Given]) -> Iterable[Row] | Row:
    from training.evaluation.evaluator import PromptCodec

    texts = PromptCodec(model.folder, plan.template, trust_remote_code=plan.trust_remote_code)
    asked = _asked(texts, given, plan.samples)
    if plan.out is None:
        rows = _responses(plan, model.folder, texts, given, asked)
        return list(rows) if plan.as_json else rows
    by = {"model": model.name, "sampling": {**plan.sampling, "seed": plan.seed, "chat": texts.chat}}
    done = _done(plan.out, given, by)
    left = [each for each in asked if (each.number, each.sample) not in done]
    written = len(asked) - len(left)
    files = SmallFiles()
    with output.kept_going():
        try:
            for row in _responses(plan, model.folder, texts, given, left):
                files.append(plan.out, {**row, **by})
                written += 1
            files.flush()
        except KeyboardInterrupt:
            model_lookup.warn(f"{plan.out}: {written:,} of {len(asked):,} responses; run the same command to continue")
            raise
    return {"out": str(plan.out), "prompts": len(given), "responses": len(asked), "before": len(asked) - len(left)}


def _asked(texts: Any, given: Sequence[Given], samples: int) -> list[_Asked]:
    """Raises InputError with the prompts that cannot be put to the model."""
    asked: list[_Asked] = []
    problems: list[Problem] = []
    for number, one in enumerate(given):
        try:
            ids = texts.ids(one.prompt)
            asked += [_Asked(number, sample, ids) for sample in range(samples)]
        except RowError as error:
            problems.append(Problem(one.where, "", str(error)))
        if len(problems) == prompts.SHOWN_PROBLEMS:
            break
    if problems:
        raise InputError(problems)
    for note in texts.notes:
        model_lookup.warn(note)
    return asked


def _responses(plan: Plan, folder: str, texts: Any, given: Sequence[Given], asked: Sequence[_Asked]) -> Iterator[Row]:
    """In the order of the prompts. What a prompt is answered depends on its number alone,
    not on who does it or on what it goes with."""
    if not asked:
        return
    from training.evaluation.streaming import key_of
    from training.group import results

    told_at = time.monotonic()
    with evaluate.asking(folder, plan.loading) as group:
        for start in range(0, len(asked), plan.batch * group.size):
            chunk = asked[start : start + plan.batch * group.size]
            keyed = [(each.ids, key_of(plan.seed, each.number, each.sample)) for each in chunk]
            shares = [keyed[rank :: group.size] for rank in range(group.size)]
            written = results(group.map("continued", shares, _settings(plan), plan.batch), _ANSWER_S)
            for place, each in enumerate(chunk):
                one = written[place % group.size][place // group.size]
                yield {
                    "number": each.number,
                    **given[each.number].row,
                    "sample": each.sample,
                    "response": texts.text(one.tokens),
                    "ended": one.ended,
                    "tokens": len(one.tokens),
                }
            if start + len(chunk) < len(asked) and time.monotonic() - told_at > _TOLD_EVERY_S:
                told_at = time.monotonic()
                model_lookup.warn(f"{start + len(chunk):,} of {len(asked):,} responses")


def _done(out: Path, given: Sequence[Given], by: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Number and sample of the responses that the file holds. Raises InputError
    if they are others than those that are asked for."""
    done: set[tuple[int, int]] = set()
    if not out.exists():
        return done
    rows = list(run_folder.json_rows(out))
    content = out.read_bytes()
    if content.count(b"\n") > len(rows) or (content and not rows):  # all but a last row that was cut off is a row
        raise InputError.of(str(out), _NO_RESPONSES)
    for row in rows:
        if not {"number", "sample", "prompt", "response", *by} <= row.keys():
            raise InputError.of(str(out), _NO_RESPONSES)
        other = [name for name, value in {**by, **by["sampling"]}.items() if {**row, **row["sampling"]}[name] != value]
        if row["number"] < len(given) and given[row["number"]].row["prompt"] != row["prompt"]:
            other.append("prompt")
        if other := [name for name in other if name != "sampling"]:
            message = f"has responses with a different {', '.join(other)}; choose a different --out, or remove the file"
            raise InputError.of(str(out), message)
        done.add((row["number"], row["sample"]))
    _cut_torn(out)
    return done


def _cut_torn(out: Path) -> None:
    """Take away what a full disk or a lost machine left of a last row."""
    with out.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def lines(answers: Iterable[Row] | Row) -> Iterator[str]:
    """For a terminal."""
    if isinstance(answers, dict):
        before = f" ({answers['before']:,} were there before)" if answers["before"] else ""
        yield f"{answers['out']}: {answers['responses']:,} responses to {answers['prompts']:,} prompts{before}"
        return
    for row in answers:
        yield f"prompt:   {_shown(row)}"
        yield f"response: {printable(row['response'].strip())}"
        yield from _expected(row)
        yield ""


def _shown(row: Mapping[str, Any]) -> str:
    """Of a conversation its last turn."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    return printable(prompt.rstrip())


def _expected(row: Mapping[str, Any]) -> Iterator[str]:
    if "expected" in row:
        yield f"expected: {printable(str(row['expected']).strip())}"
