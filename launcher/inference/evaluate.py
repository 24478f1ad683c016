"""`muster eval`: evaluates a model on questions with known answers, or compares two models by a reward model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.inference import model_lookup
from launcher.process import output, terminal
from training.config import Questions, Resources
from training.data import questions
from training.data.questions import Question
from training.data.row_errors import RowError
from training.errors import InputError, Problem
from training.evaluation.accuracy import Row, in_order, interval, measured
from training.group import Group, results
from training.io.owned_folders import temporary_folder

_ANSWER_S = 24 * 3600.0
_SHOWN = 5
TEMPLATES = ("auto", "plain", "chat")


@dataclass(frozen=True)
class Loading:
    """How a model is loaded to be asked."""

    template: str
    """One of TEMPLATES."""
    workers: int
    trust_remote_code: bool
    """Whether Python code that comes with the model may run."""


def settings(data: Path, *, question: str | None, answer: str | None, **others: Any) -> Questions:
    """The settings of an evaluation from the options of the command line; columns are only those that were named."""
    columns = {name: column for name, column in (("question", question), ("answer", answer)) if column}
    return Questions(data=str(data), columns=columns, **others)


def refuse_odd_options(against: str | None, reward: str | None, samples: int, temperature: float) -> None:
    """Raises InputError for options of the command line that do not go together."""
    if (against is None) != (reward is None):
        raise InputError.of("command line", "--against and --reward must be given together")
    if samples > 1 and temperature == 0:
        raise InputError.of("--temperature", "several samples at temperature 0 are the same; choose one, such as 0.7")


@output.kept_going()
def evaluate(
    model: str, data: Path, settings: Questions,
    *, template: str, workers: int, seed: int, out: Path | None, trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The accuracy of a model on the questions of a file, and how it was come by.
    Raises InputError before anything is loaded."""
    _refuse_template(template)
    refuse_unused_top_p(settings.temperature, settings.top_p)
    asked = questions.read(str(data), settings.columns, settings.limit)
    folder = model_lookup.model_folder(model, trust_remote_code=trust_remote_code)
    loading = Loading(template, workers, trust_remote_code)
    rows, seconds = _answers(folder, asked, settings, loading, seed)
    if out is not None:
        _write(out, rows)
    return {
        "model": folder,
        "data": str(data),
        "questions": len(asked),
        **measured(rows, ""),
        "tokens_per_s": sum(row["tokens"] for row in rows) / seconds,
        "rows": str(out) if out is not None else None,
        "shown": [
            {key: row[key] for key in ("row", "expected", "answer", "correct", "response")} for row in rows[:_SHOWN]
        ],
    }


@output.kept_going()
def compare(
    model: str, other: str, judge: str, data: Path, settings: Questions,
    *, template: str, workers: int, seed: int, out: Path | None, trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """How often a model's response is rewarded more than that of another to the same question; equals count half."""
    _refuse_template(template)
    refuse_unused_top_p(settings.temperature, settings.top_p)
    asked = questions.read(str(data), settings.columns, settings.limit, answers=False)
    trusted = {"trust_remote_code": trust_remote_code}
    folders = [model_lookup.model_folder(name, **trusted) for name in (model, other)]
    reward_model = model_lookup.model_folder(judge, rewards=True, **trusted)
    from training.evaluation.evaluator import RewardScorer, require_reward_model

    require_reward_model(reward_model, **trusted)  # before any question is answered
    _check_reward_model(reward_model, asked, trust_remote_code)
    loading = Loading(template, workers, trust_remote_code)
    both = [_answers(folder, asked, settings, loading, seed)[0] for folder in folders]
    court = RewardScorer(reward_model, **trusted)
    for rows in both:
        prompts = [asked[row["number"]].prompt for row in rows]
        for row, reward in zip(rows, court.rewards(prompts, *_columns(rows, "response", "ended")), strict=True):
            row["reward"] = reward
    pairs = list(zip(*both, strict=True))
    wins = sum((a["reward"] > b["reward"]) + 0.5 * (a["reward"] == b["reward"]) for a, b in pairs)
    if out is not None:
        _write(out, [{"model": folder, **row} for pair in pairs for folder, row in zip(folders, pair, strict=True)])
    low, high = interval(wins / settings.samples, len(asked))
    return {
        "model": folders[0],
        "against": folders[1],
        "judge": reward_model,
        "questions": len(asked),
        "win_rate": wins / len(pairs),
        "win_rate_low": low,
        "win_rate_high": high,
        "reward": sum(a["reward"] for a, _ in pairs) / len(pairs),
        "reward_against": sum(b["reward"] for _, b in pairs) / len(pairs),
        "rows": str(out) if out is not None else None,
    }


def _check_reward_model(reward_model: str, asked: Sequence[Question], trust_remote_code: bool) -> None:
    """Raises InputError with the questions that the reward model's template refuses;
    prints notes on parts of the others that it does not see."""
    from training.data.model_renderer import renderer_for
    from training.data.reward_prompts import RESPONSE, conversation_notes

    renderer = renderer_for(reward_model, trust_remote_code=trust_remote_code)
    judged = renderer.judged([each.prompt for each in asked], [RESPONSE] * len(asked), [True] * len(asked))
    refused = [(each, why) for each, why in zip(asked, judged, strict=True) if isinstance(why, RowError)]
    if refused:
        message = f"the reward model {reward_model} cannot be given this question"
        raise InputError(
            [Problem(each.where, "", f"{message}: {why}") for each, why in refused[: questions.SHOWN_PROBLEMS]]
        )
    for note in conversation_notes(renderer.notes):
        model_lookup.warn(f"the reward model {reward_model}: {note}")


def _refuse_template(template: str) -> None:
    if template not in TEMPLATES:
        raise InputError.of("--template", f"got {template}, expected one of {', '.join(TEMPLATES)}")


def refuse_unused_top_p(temperature: float, top_p: float) -> None:
    """Raises InputError where it would have no effect."""
    if temperature == 0 and top_p < 1:
        message = (
            "has no effect at temperature 0, where the most likely token is chosen; set --temperature above 0, "
            "or omit it"
        )
        raise InputError.of("--top-p", message)


def _columns(rows: Sequence[Row], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _answers(
    folder: str, asked: Sequence[Question], settings: Questions, loading: Loading, seed: int
) -> tuple[list[Row], float]:
    """The judged responses, question by question, and the seconds they took once the model was loaded."""
    _check_questions(folder, asked, loading, settings.max_new_tokens)
    with asking(folder, loading) as group:
        began = time.monotonic()
        shares = results(group.call("answer", asked, settings, seed), _ANSWER_S)
        return in_order(shares), time.monotonic() - began


def _check_questions(folder: str, asked: Sequence[Question], loading: Loading, max_new_tokens: int) -> None:
    """Raises InputError with the questions that cannot be put to the model, before it is loaded; prints notes on parts
    of the others that it does not see."""
    from training.data.question_prompts import room_note
    from training.evaluation.evaluator import PromptCodec

    texts = PromptCodec(folder, loading.template, trust_remote_code=loading.trust_remote_code)
    problems, longest = [], 0
    for question in asked:
        try:
            longest = max(longest, len(texts.ids(question.prompt)))
        except RowError as error:
            problems.append(Problem(question.where, "", str(error)))
        if len(problems) == questions.SHOWN_PROBLEMS:
            break
    if problems:
        raise InputError(problems)
    for note in [*texts.notes, *room_note(longest, texts.window, max_new_tokens)]:
        model_lookup.warn(note)


@contextmanager
def asking(folder: str, loading: Loading) -> Iterator[Group]:
    """Workers with the model loaded, that can be asked to `answer`: one in this process, more of them on Ray."""
    from training.evaluation.evaluator import Evaluator

    template, workers, trust_remote_code = loading.template, loading.workers, loading.trust_remote_code
    if workers == 1:
        from training.group import InlineGroup, Worker
        from training.process.distributed import RankInfo

        worker = Worker(RankInfo(rank=0, size=1))
        worker.roles["evaluator"] = Evaluator(worker.rank_info, folder, template, trust_remote_code)
        yield InlineGroup(worker, "evaluator")
        return
    from launcher.workers.ray_session import own_fork_server, ray_session

    with own_fork_server(), ray_session(workers), temporary_folder("muster-eval-") as logs:
        from launcher.workers.worker_group import (
            WorkerGroup,  # which imports Ray: it takes its token from the session's environment
        )

        group = WorkerGroup(Resources(workers=workers), model_lookup.warn, model_lookup.warn)
        try:
            group.begin(logs)
            here = str(Path(folder).absolute())  # a Ray that was there before us works in another folder
            yield group.build("evaluator", "training.evaluation.evaluator:Evaluator", here, template, trust_remote_code)
        finally:
            group.close()


def _write(path: Path, rows: Sequence[Row]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError.of(str(path), f"cannot be written: {error.strerror}; choose another --out") from error


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for a terminal."""
    if "win_rate" in report:
        yield (
            f"{report['model']} is rewarded more than {report['against']} in {report['win_rate']:.1%} of "
            f"{report['questions']:,} questions (95 %: {report['win_rate_low']:.1%} to {report['win_rate_high']:.1%}); "
            f"mean reward {report['reward']:.3f} against {report['reward_against']:.3f}"
        )
        return
    for row in report["shown"]:
        mark = "right" if row["correct"] else "wrong"
        response = terminal.printable(" ".join(row["response"].split()))
        yield f"{row['row']}: {mark}: expected {row['expected']}, got {row['answer']}: {response[:200]}"
    passed = "".join(f", {name} {report[name]:.1%}" for name in report if name.startswith("pass@"))
    yield (
        f"accuracy {report['accuracy']:.1%} (95 %: {report['accuracy_low']:.1%} to "
        f"{report['accuracy_high']:.1%}){passed} of {report['questions']:,} questions; {report['eos_rate']:.0%} of the "
        f"responses ended by themselves, {report['response_tokens']:.0f} tokens long; {report['tokens_per_s']:,.0f} "
        "tokens/s"
    )
