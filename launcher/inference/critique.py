"""`muster critique`: builds data for critique fine-tuning (arXiv:2501.17703).
Questions -> answers, right and wrong -> critiques of a teacher.

What was written down is never asked for again: beside OUT.jsonl there is a folder OUT.jsonl.work with every answer and
every reply, each appended as it comes. The data itself is made from them at the end, so that what is kept can be
decided anew without paying twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.inference import evaluate
from launcher.inference import model_lookup as models
from launcher.inference.teacher import Budget, BudgetSpent, Endpoint, Nonsense, Reply, Teacher
from launcher.process import output
from launcher.runfolder import run_folder
from launcher.runfolder.small_files import SmallFiles
from training import model_folder
from training.config import Questions
from training.data import files, questions
from training.data.final_answers import expected_answer, final_answer, same, verdict
from training.data.formats import critique_request
from training.data.questions import Question
from training.data.row_errors import RowError
from training.errors import InputError, Problem, TrainingError
from training.recipes import RECIPES

Answering = Callable[[Sequence[Question]], Sequence[Mapping[str, Any]]]
"""Rows of number, question, sample, response, ended and tokens, in the order of the questions."""

SYSTEM = (
    "You are a careful teacher of science. Examine the solution to the question step by step: say which steps are "
    "sound and which are not, and correct what is wrong. End with exactly one line: `Conclusion: right [END]` if the "
    "solution is correct, else `Conclusion: wrong [END]`."
)
_PROBED = 20
"""Replies after which a teacher that never followed the format is given up."""
_EXAMPLES = 2
_CHUNK = 64
"""Critiques that a model writes before they are kept."""


@dataclass(frozen=True)
class Task:
    """An answer that is to be critiqued."""

    question: str
    answer: str
    source: str
    """Who gave it: a column, or a model."""
    known: str | None
    """The right answer, if it is known."""

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.question, self.answer]).encode()).hexdigest()[:24]


class Journal:
    """Rows that are appended as they come and never lost."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._files = SmallFiles()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = list(run_folder.json_rows(path))

    def add(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            self.rows.append(dict(row))
            self._files.append(self.path, row)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """However the block ends, return when every row is written."""
        try:
            yield
        finally:
            self._files.flush()


def from_columns(data: Path, columns: Sequence[str], known: str | None, limit: int | None) -> list[Task]:
    """The answers that a file holds in some columns. Raises InputError with the rows that lack one."""
    source = questions.find_source(str(data))
    tasks: list[Task] = []
    problems: list[Problem] = []
    rows = (row for part in source.parts for row in files.rows(part))
    for row in itertools.islice(rows, limit):
        if len(problems) >= questions.SHOWN_PROBLEMS:
            break
        try:
            if isinstance(row.value, RowError):
                raise row.value
            tasks += _of_row(row.value, columns, known)
        except RowError as error:
            problems.append(Problem(row.where, "", str(error)))
    if problems:
        raise InputError(problems)
    if not tasks:
        raise InputError.of(str(data), "holds no rows")
    return tasks


def _of_row(row: Mapping[str, Any], columns: Sequence[str], known: str | None) -> Iterator[Task]:
    question = questions.question_text(row)
    right = expected_answer(questions.column(row, "known answer", (known,))) if known is not None else None
    for name in columns:
        yield Task(question, questions.column(row, "answer", (name,)), name, right)


def sampled(
    asked: Sequence[Question], model: str, journal: Journal, answer: Answering, say: Callable[[str], None]
) -> None:
    """Have a model answer the questions that it has not answered yet."""
    done = {row["question"] for row in journal.rows if row["model"] == model}
    left = [question for question in asked if question.text not in done]
    for start in range(0, len(left), _CHUNK):
        chunk = left[start : start + _CHUNK]
        for row in answer(chunk):
            named = {"question": chunk[row["number"]].text, "sample": row["sample"], "response": row["response"]}
            journal.add({"model": model, **named})
        say(f"answers of {model}: {len(done) + start + len(chunk):,} of {len(asked):,} questions")


def of_models(asked: Sequence[Question], models: Sequence[str], journal: Journal) -> list[Task]:
    """The answers that were sampled."""
    known = {question.text: question.expected for question in asked}
    return [
        Task(row["question"], row["response"].strip(), row["model"], known[row["question"]])
        for row in journal.rows
        if row["question"] in known and row["model"] in models and row["response"].strip()
    ]


def distinct(tasks: Sequence[Task]) -> tuple[list[Task], int]:
    """Every pair of question and answer once, and how many there were too many."""
    once = {task.key: task for task in reversed(tasks)}
    kept = [task for task in tasks if once.pop(task.key, None) is not None]
    return kept, len(tasks) - len(kept)


def messages_for(task: Task) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": critique_request(task.question, task.answer)},
    ]


def ask_endpoint(
    tasks: Sequence[Task], teacher: Teacher, journal: Journal, parallel: int, say: Callable[[str], None]
) -> str | None:
    """Have the teacher critique what it has not yet. Returns why it ended early, if it did.
    Raises what the teacher raises.

    An interruption waits for what is under way, since that is paid for.
    """
    left = _left(tasks, journal)
    waiting: dict[Future[str], Task] = {}
    ended: str | None = None
    error: Exception | None = None
    told_at = time.monotonic()
    contradicting: list[bool] = []

    def say_later(count: int, every_s: float = 10.0) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > every_s:
            told_at = time.monotonic()
            say(f"critiques: {count:,}; {len(left):,} to ask")

    def ask(task: Task) -> str:
        """In a thread: what is answered is written down there, whatever becomes of the one who waits for it."""
        reply = teacher.ask(messages_for(task))
        journal.add(_kept(task, reply, teacher.endpoint.model))
        return reply.text

    def take(futures: Iterable[Future[str]]) -> None:
        nonlocal ended, error
        for future in futures:
            task = waiting.pop(future)
            try:
                contradicting.append(_contradicts(task, future.result()))
            except BudgetSpent as spent:
                ended = str(spent)
            except Nonsense as nonsense:
                journal.add({"key": task.key, "teacher": teacher.endpoint.model, "error": str(nonsense)})
            except (InputError, TrainingError) as failed:
                error = error or failed

    with ThreadPoolExecutor(parallel) as pool:  # which waits for its threads at the end, however that comes
        try:
            while (left or waiting) and error is None:
                say_later(len(journal.rows))
                while left and ended is None and len(waiting) < parallel:
                    task = left.pop(0)
                    waiting[pool.submit(ask, task)] = task
                if not waiting:
                    break
                take(wait(waiting, return_when=FIRST_COMPLETED).done)
                _refuse_without_form(journal, teacher.endpoint.model)
                _refuse_contradictions(contradicting, teacher.endpoint.model)
            if error is not None:
                raise error
        except BaseException:
            teacher.stopping.set()
            raise
    return ended


def ask_model(
    tasks: Sequence[Task],
    model: str,
    journal: Journal,
    answer: Answering,
    say: Callable[[str], None],
    *,
    learnt: bool = False,
) -> None:
    """The same with a model that the workers run. `learnt`: the recipe cft has made it,
    so it is asked as in the rows of that recipe."""
    told = "" if learnt else f"{SYSTEM}\n\n"
    contradicting: list[bool] = []
    left = _left(tasks, journal)
    for start in range(0, len(left), _CHUNK):
        chunk = left[start : start + _CHUNK]
        requests = [Question("", f"{told}{critique_request(task.question, task.answer)}", "") for task in chunk]
        for row in answer(requests):
            task = chunk[row["number"]]
            journal.add(_kept(task, Reply(row["response"], not row["ended"], 0, row["tokens"]), model))
            contradicting.append(_contradicts(task, row["response"]))
        _refuse_without_form(journal, model)
        _refuse_contradictions(contradicting, model)
        say(f"critiques: {start + len(chunk):,} of {len(left):,}")


def _left(tasks: Sequence[Task], journal: Journal) -> list[Task]:
    done = {row["key"] for row in journal.rows if "critique" in row}
    return [task for task in tasks if task.key not in done]


def _kept(task: Task, reply: Reply, teacher: str) -> dict[str, Any]:
    return {
        "key": task.key, "teacher": teacher, "critique": reply.text, "cut": reply.cut,
        "prompt_tokens": reply.prompt_tokens,
        "reply_tokens": reply.reply_tokens,
    }  # fmt: skip


def _refuse_without_form(journal: Journal, teacher: str) -> None:
    """Raises TrainingError for a teacher of whom no reply has had a conclusion."""
    replies = [row["critique"] for row in journal.rows if "critique" in row and row["teacher"] == teacher]
    if len(replies) >= _PROBED and not any(verdict(reply) for reply in replies):
        examples = "\n".join(f"  {' '.join(reply.split())[-200:] or '(nothing)'}" for reply in replies[:_EXAMPLES])
        raise TrainingError(
            f"{teacher} has not once ended with `Conclusion: right [END]` or `Conclusion: wrong [END]` in "
            f"{len(replies)} replies, so it is not asked further; two of them end with:\n{examples}\ntake another "
            "teacher, or one that follows instructions"
        )


def _refuse_contradictions(contradicting: Sequence[bool], teacher: str) -> None:
    """Raises TrainingError if the known answers cannot be the answers."""
    if len(contradicting) >= _PROBED and all(contradicting):
        raise TrainingError(
            f"every one of {len(contradicting)} conclusions of {teacher} contradicts the known answer, so it is not "
            "asked further; is --known the column of the right answers?"
        )


def _contradicts(task: Task, critique: str) -> bool:
    said = verdict(critique)
    if task.known is None or said is None:
        return False
    return said != ("right" if same(task.known, final_answer(task.answer)) else "wrong")


def write(tasks: Sequence[Task], journal: Journal, out: Path) -> Counter[str]:
    """The rows that hold, as data for the recipe cft; and how many were kept or dropped, by why."""
    replies = {row["key"]: row for row in journal.rows if "critique" in row}
    counts: Counter[str] = Counter()
    draft = out.with_name(f".{out.name}")
    with draft.open("w", encoding="utf-8") as file:
        for task in tasks:
            why = _why_dropped(task, replies.get(task.key))
            counts[why or "kept"] += 1
            if why:
                continue
            reply = replies[task.key]
            row = {
                "question": task.question, "answer": task.answer, "critique": reply["critique"].strip(),
                "verdict": verdict(reply["critique"]), "source": task.source, "teacher": reply["teacher"],
            }  # fmt: skip
            counts[f"verdict {row['verdict']}"] += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(draft, out)
    return counts


def _why_dropped(task: Task, reply: Mapping[str, Any] | None) -> str:
    if reply is None:
        return "not critiqued yet"
    if reply["cut"]:
        return "cut off at max_new_tokens"
    said = verdict(reply["critique"])
    if said is None:
        return "no conclusion"
    if _contradicts(task, reply["critique"]):
        return "contradicts the known answer"
    return ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line asks for."""

    out: Path
    data: Path
    columns: Sequence[str] = ()
    """Of the data, with answers."""
    known: str | None = None
    """Column of the right answer, beside `columns`."""
    models: Sequence[str] = ()
    """That are asked for answers."""
    samples: int = 4
    temperature: float = 1.0
    limit: int | None = None
    teacher: Endpoint | str
    """An endpoint, or a model."""
    budget: Budget
    parallel: int = 8
    per_minute: float | None = None
    max_new_tokens: int = 3200
    workers: int = 1
    seed: int = 0
    trust_remote_code: bool = False
    """Whether Python code that comes with the models may run."""

    @property
    def loading(self) -> evaluate.Loading:
        return evaluate.Loading("auto", self.workers, self.trust_remote_code)


def teacher_from(
    name: str, model: str | None, key_env: str | None, max_new_tokens: int, *, timeout_s: float, patience_s: float
) -> Endpoint | str:
    """The teacher that the command line names: an endpoint, or a model. Raises InputError for any other address."""
    if not name.startswith(("http://", "https://")):
        if "://" in name and not name.startswith(("s3://", "gs://")):
            raise InputError.of("--teacher", f"{name} is neither http(s)://... nor a model")
        return name
    if model is None:
        raise InputError.of("--teacher-model", "say which model at the endpoint is the teacher")
    return Endpoint(
        url=name, model=model, key_env=key_env, max_new_tokens=max_new_tokens, timeout_s=timeout_s,
        patience_s=patience_s
    )  # fmt: skip


def budget_from(tokens: int | None, cost: float | None, price_in: float, price_out: float) -> Budget:
    """The budget that the command line sets. Raises InputError for a limit of the cost without prices."""
    if cost is not None and not (price_in or price_out):
        raise InputError.of("--max-cost", "needs --price-in and --price-out, of a million tokens")
    return Budget(tokens=tokens, cost=cost, price_in=price_in, price_out=price_out)


@output.kept_going()
def build(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it, going on where it stopped. Raises InputError before anything is asked for
    if something is wrong with the input."""
    if bool(plan.columns) == bool(plan.models):
        raise InputError.of(
            "command line",
            "say where the answers come from: --column (of the data) or --sample (a model), one of the two",
        )
    _refuse_missing_key(plan.teacher)
    _refuse_place(plan)
    work = plan.out.with_name(f"{plan.out.name}.work")
    tasks = (
        from_columns(plan.data, plan.columns, plan.known, plan.limit) if plan.columns else _of_models(plan, work, say)
    )
    tasks, duplicates = distinct(tasks)
    journal = Journal(work / "critiques.jsonl")
    _refuse_other_teacher(plan, journal)
    before = len(_left(tasks, journal))
    with journal.kept():
        ended = _ask(plan, tasks, journal, say) if before else None
    if ended and not plan.budget.used_in and not any("critique" in row for row in journal.rows):
        raise InputError.of(
            "--max-tokens, --max-cost",
            f"not enough for a single request of --max-new-tokens {plan.max_new_tokens}: {ended}",
        )
    counts = write(tasks, journal, plan.out)
    counts["duplicate"] = duplicates
    report = {
        "out": str(plan.out), "rows": dict(+counts), "asked": before - len(_left(tasks, journal)), "ended": ended,
        "tokens": [plan.budget.used_in, plan.budget.used_out] if isinstance(plan.teacher, Endpoint) else None,
        "cost": plan.budget.spent,
    }  # fmt: skip
    (work / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _refuse_missing_key(teacher: Endpoint | str) -> None:
    if isinstance(teacher, Endpoint) and teacher.key_env is not None and not os.environ.get(teacher.key_env):
        raise InputError.of(
            "--key-env", f"{teacher.key_env} is not set in the environment; `export {teacher.key_env}=...`"
        )


def _refuse_place(plan: Plan) -> None:
    if plan.out.is_dir():
        raise InputError.of(str(plan.out), "is a folder; name a file to write")
    if plan.out.exists() and plan.out.resolve() == plan.data.resolve():
        raise InputError.of(str(plan.out), "is the data itself; name another file to write")
    if not plan.out.absolute().parent.is_dir():
        raise InputError.of(str(plan.out), "the folder for it does not exist")


def _refuse_other_teacher(plan: Plan, journal: Journal) -> None:
    """Critiques of two teachers in one file would be told apart by nobody."""
    now = plan.teacher.model if isinstance(plan.teacher, Endpoint) else plan.teacher
    others = {row["teacher"] for row in journal.rows} - {now}
    if others:
        raise InputError.of(
            str(plan.out),
            f"was begun with the teacher {', '.join(sorted(others))}; name another file for {now}, or go on with the "
            "same",
        )


def _of_models(plan: Plan, work: Path, say: Callable[[str], None]) -> list[Task]:
    asked = questions.read(str(plan.data), None, plan.limit)
    journal = Journal(work / "answers.jsonl")
    settings = Questions(
        data=str(plan.data), samples=plan.samples, temperature=plan.temperature, max_new_tokens=plan.max_new_tokens
    )
    for model in plan.models:
        folder = models.model_folder(model, trust_remote_code=plan.trust_remote_code)
        done = {row["question"] for row in journal.rows if row["model"] == model}
        if any(question.text not in done for question in asked):
            with journal.kept(), evaluate.asking(folder, plan.loading) as group:
                sampled(asked, model, journal, _answering(group, settings, plan.seed), say)
    return of_models(asked, plan.models, journal)


def _ask(plan: Plan, tasks: Sequence[Task], journal: Journal, say: Callable[[str], None]) -> str | None:
    if isinstance(plan.teacher, Endpoint):
        teacher = Teacher(plan.teacher, plan.budget, plan.per_minute, say)
        return ask_endpoint(tasks, teacher, journal, plan.parallel, say)
    settings = Questions(data=str(plan.data), temperature=0.3, top_p=0.95, max_new_tokens=plan.max_new_tokens)
    folder = models.model_folder(plan.teacher, trust_remote_code=plan.trust_remote_code)
    learnt = _learnt_critiques(folder)
    with evaluate.asking(folder, plan.loading) as group:
        ask_model(tasks, plan.teacher, journal, _answering(group, settings, plan.seed), say, learnt=learnt)
    return None


def _learnt_critiques(folder: str) -> bool:
    """Whether the model in a folder was trained to write critiques, by what its phase noted."""
    recipe = RECIPES.get(str(model_folder.recorded_info(folder).get("recipe")))
    return recipe is not None and recipe.learns_critiques


def _answering(group: Any, settings: Questions, seed: int) -> Answering:
    from training.evaluation.accuracy import in_order
    from training.group import results
    from training.seeding import seed_for

    def answer(asked: Sequence[Question]) -> Sequence[Mapping[str, Any]]:
        # The numbers of a draw go by the place in what is asked at once.
        own = seed_for(seed, "critique", asked[0].text)
        return in_order(results(group.call("answer", asked, settings, own)))

    return answer


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """For a terminal."""
    counts = report["rows"]
    yield (
        f"{report['out']}: {counts.get('kept', 0):,} rows ({counts.get('verdict right', 0):,} right, "
        f"{counts.get('verdict wrong', 0):,} wrong)"
    )
    for why, count in sorted(counts.items()):
        if why != "kept" and not why.startswith("verdict "):
            yield f"  left out: {count:,} {why}"
    if report["tokens"]:
        cost = f", {report['cost']:.2f}" if report["cost"] else ""
        yield f"  the teacher read {report['tokens'][0]:,} tokens and wrote {report['tokens'][1]:,}{cost}"
    if report["ended"]:
        yield f"  ended early: {report['ended']}; the same command goes on"
