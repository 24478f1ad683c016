"""A seeded generator of word problems and sums: worked answers, answers with one known flaw, critiques. Pure Python.

A problem is a short chain of `Step`s over the numbers of its question. Every answer is worked out from such a chain, so
a flawed answer is an honest one: one step is altered, and everything after it follows from the altered step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any, Literal, NamedTuple
from zlib import crc32

from training.seeding import seed_for

Split = Literal["train", "heldout", "eval"]
Row = dict[str, str]

WRONG = 0.4
"""The part of texts, and of answers that were written without care, that has a flaw."""
LARGEST = 99
"""No number of a problem or of its answers is larger."""

NAMES = {"Mia": "she", "Ann": "she", "Zoe": "she", "Eva": "she", "Tom": "he", "Ben": "he", "Max": "he", "Leo": "he"}
THINGS = ("pens", "books", "cards", "coins", "shells", "apples", "stamps", "beads", "nuts", "eggs")
CONTAINERS = ("boxes", "bags", "packs", "jars")
OPENINGS = (
    "{name} has {amount} {things}",
    "{name} starts with {amount} {things}",
    "At first {name} has {amount} {things}",
)
GAINS = ("finds {amount}", "buys {amount}", "gets {amount} from {friend}", "wins {amount}")
LOSSES = ("loses {amount}", "sells {amount}", "gives {amount} to {friend}", "uses {amount}")
TELLINGS = ("{He} {first} and {second}.", "{He} {first}, then {second}.", "Then {he} {first}. Later {he} {second}.")
QUESTIONS = ("How many {things} does {he} have now?", "How many {things} has {name} in the end?")


# --- a chain of steps and its working --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """An operand: the result of the earlier step of this index."""

    step: int


@dataclass(frozen=True)
class Step:
    """One calculation, with the words of the question that ask for it."""

    left: int | Result
    op: str
    right: int | Result
    reason: str
    slip: int = 0
    """What is added to the true result: 0 unless the arithmetic is wrong."""


class Line(NamedTuple):
    """A step worked out, such as 14+12=26."""

    left: int
    op: str
    right: int
    result: int

    @property
    def expression(self) -> str:
        return f"{self.left}{self.op}{self.right}"

    def __str__(self) -> str:
        return f"{self.expression}={self.result}"


Steps = tuple[Step, ...]


def work(steps: Steps) -> list[Line]:
    """The lines that these steps give, each computed from the lines before it, slips included."""
    lines: list[Line] = []
    for step in steps:
        left, right = (o if isinstance(o, int) else lines[o.step].result for o in (step.left, step.right))
        result = {"+": left + right, "-": left - right, "*": left * right}[step.op]
        lines.append(Line(left, step.op, right, result + step.slip))
    return lines


def write_out(lines: list[Line]) -> str:
    """The answer as text: a line a step, then `#### ` and the last result."""
    return "\n".join([*map(str, lines), f"#### {lines[-1].result}"])


def _plausible(lines: list[Line]) -> bool:
    return all(0 < number <= LARGEST for line in lines for number in (line.left, line.right, line.result))


# --- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A question and the steps that solve it."""

    question: str
    steps: Steps
    flaws: tuple[str, ...] = ("arithmetic", "operation", "number", "skipped")
    """What somebody may do wrong: keys of FLAWS."""

    @property
    def numbers(self) -> list[int]:
        """The numbers of the question, sorted."""
        operands = [o for step in self.steps for o in (step.left, step.right)]
        return sorted(o for o in operands if isinstance(o, int))

    @property
    def split(self) -> Split:
        """Where this problem belongs: a function of its numbers alone, so that no two splits ever share a set of
        numbers, whatever the words, the order and the seed."""
        bucket = crc32(repr(self.numbers).encode()) % 20
        return "heldout" if bucket == 0 else "eval" if bucket == 1 else "train"

    @property
    def working(self) -> str:
        return write_out(work(self.steps))

    @property
    def answer(self) -> str:
        return str(work(self.steps)[-1].result)


class Amount(NamedTuple):
    """A number of things: `number` of them, or `number` containers that hold `each`."""

    number: int
    each: int = 1
    container: str = ""

    def __str__(self) -> str:
        return f"{self.number} {self.container} of {self.each}" if self.container else str(self.number)


def problems(seed: int, purpose: str, split: Split, make: Callable[[Random], Problem]) -> Iterator[Problem]:
    """Endless problems of one split, no question twice."""
    rng = Random(seed_for(seed, "word problems", purpose, split))
    seen: set[str] = set()
    while True:
        problem = make(rng)
        if problem.split == split and _plausible(work(problem.steps)) and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def word_problem(rng: Random) -> Problem:
    """Somebody has some things, and twice their number changes. One of the three amounts may come in containers."""
    packed = rng.randrange(4)
    start, *changes = (_amount(rng, packed=i == packed, largest=40 if i == 0 else 15) for i in range(3))
    name, friend = rng.sample(list(NAMES), 2)
    words = {
        "name": name,
        "friend": friend,
        "he": NAMES[name],
        "He": NAMES[name].capitalize(),
        "things": rng.choice(THINGS),
    }

    opening = rng.choice(OPENINGS).format(amount=start, **words)
    ops = [rng.choice("+-") for _ in changes]
    events = [
        rng.choice(GAINS if op == "+" else LOSSES).format(amount=amount, **words)
        for op, amount in zip(ops, changes, strict=True)
    ]
    telling = rng.choice(TELLINGS).format(first=events[0], second=events[1], **words)
    question = f"{opening}. {telling} {rng.choice(QUESTIONS).format(**words)}"
    reasons = [opening, *(f"{words['he']} {event}" for event in events)]
    return Problem(question, _chain(start, ops, changes, reasons))


def _amount(rng: Random, *, packed: bool, largest: int) -> Amount:
    if packed:
        return Amount(rng.randint(2, 5), rng.randint(2, 6), rng.choice(CONTAINERS))
    return Amount(rng.randint(2, largest))


def plain_sum(rng: Random) -> Problem:
    """Two changes of a number and no words: 14+3-9. Whoever is careless here takes or leaves out the wrong thing, and
    calculates right: a tiny reward model sees the one and hardly the other."""
    start, *changes = (Amount(rng.randint(2, largest)) for largest in (25, 12, 12))
    ops = [rng.choice("+-") for _ in changes]
    question = f"{start}" + "".join(f"{op}{amount}" for op, amount in zip(ops, changes, strict=True))
    return Problem(question, _chain(start, ops, changes, [question] * 3), ("operation", "number", "skipped"))


def _chain(start: Amount, ops: list[str], changes: list[Amount], reasons: list[str]) -> Steps:
    """The steps in the order of the story; an amount in containers is multiplied out just before it is needed."""
    steps: list[Step] = []

    def operand(amount: Amount, reason: str) -> int | Result:
        return then(amount.number, "*", amount.each, reason) if amount.container else amount.number

    def then(left: int | Result, op: str, right: int | Result, reason: str) -> Result:
        steps.append(Step(left, op, right, reason))
        return Result(len(steps) - 1)

    total = operand(start, reasons[0])
    for op, amount, reason in zip(ops, changes, reasons[1:], strict=True):
        total = then(total, op, operand(amount, reason), reason)
    return tuple(steps)


# --- flaws -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlawedAnswer:
    """A wrong answer of which it is known what is wrong, and where."""

    kind: str
    """A key of FLAWS."""
    step: int
    """Index of the step that is wrong or missing; the ones before it are right."""
    working: str
    complaint: str
    """What is wrong with that step, and why, in words."""


def flawed(problem: Problem, rng: Random) -> FlawedAnswer:
    """An answer with exactly one flaw, of a kind and at a step picked at random, that ends in a wrong result."""
    right = work(problem.steps)
    while True:
        kind = rng.choice(problem.flaws)
        alter, complain = FLAWS[kind]
        for index in rng.sample(range(len(right)), len(right)):
            lines = work(alter(problem, index, rng))
            if _plausible(lines) and _goes_wrong_at(index, lines, right):
                complaint = complain(problem.steps[index], right[index], lines[min(index, len(lines) - 1)])
                return FlawedAnswer(kind, index, write_out(lines), complaint)


def _goes_wrong_at(index: int, lines: list[Line], right: list[Line]) -> bool:
    """Whether the working departs from the right one at this very step, and its end is wrong too."""
    return bool(lines) and lines[-1].result != right[-1].result and lines[index : index + 1] != [right[index]]


def _change(steps: Steps, index: int, **changes: Any) -> Steps:
    return (*steps[:index], replace(steps[index], **changes), *steps[index + 1 :])


def _miscalculate(problem: Problem, index: int, rng: Random) -> Steps:
    return _change(problem.steps, index, slip=rng.choice((-30, -20, -10, 10, 20, 30)))


def _mistake_operation(problem: Problem, index: int, rng: Random) -> Steps:
    return _change(problem.steps, index, op={"+": "-", "-": "+", "*": "+"}[problem.steps[index].op])


def _miscopy(problem: Problem, index: int, rng: Random) -> Steps:
    """Instead of one number of the question another stands. Nothing, where the step has no such number."""
    step = problem.steps[index]
    sides = [side for side in ("left", "right") if isinstance(getattr(step, side), int)]
    if not sides:
        return ()
    side = rng.choice(sides)
    wrong = rng.choice([number for number in range(2, 41) if number not in problem.numbers])
    return _change(problem.steps, index, **{side: wrong})


def _skip(problem: Problem, index: int, rng: Random) -> Steps:
    """Without the step: where its result was needed, its left operand stands instead."""
    skipped = problem.steps[index]

    def moved(operand: int | Result) -> int | Result:
        if operand == Result(index):
            return skipped.left
        return Result(operand.step - 1) if isinstance(operand, Result) and operand.step > index else operand

    later = (replace(step, left=moved(step.left), right=moved(step.right)) for step in problem.steps[index + 1 :])
    return (*problem.steps[:index], *later)


def _says_result(step: Step, right: Line, wrong: Line) -> str:
    return f"{right}, not {wrong.result}"


def _says_operation(step: Step, right: Line, wrong: Line) -> str:
    return f"{step.reason}, so it is {right.expression}, not {wrong.expression}"


def _says_number(step: Step, right: Line, wrong: Line) -> str:
    number, copied = (right.left, wrong.left) if right.left != wrong.left else (right.right, wrong.right)
    return f"the question says {number}, not {copied}"


def _says_missing(step: Step, right: Line, wrong: Line) -> str:
    return f"{step.reason}, so {right} is missing"


Alter = Callable[[Problem, int, Random], Steps]
Complain = Callable[[Step, Line, Line], str]
FLAWS: dict[str, tuple[Alter, Complain]] = {
    "arithmetic": (_miscalculate, _says_result),
    "operation": (_mistake_operation, _says_operation),
    "number": (_miscopy, _says_number),
    "skipped": (_skip, _says_missing),
}


# --- rows ------------------------------------------------------------------------------------------------------------


def critique(problem: Problem, flaw: FlawedAnswer | None) -> str:
    """Goes through the steps up to the one that is wrong, or through all, and concludes."""
    lines = work(problem.steps)
    remarks = [f"{line} is right" for line in lines[: flaw.step if flaw else None]]
    remarks += [flaw.complaint] if flaw else []
    steps = [f"Step {number}: {remark}." for number, remark in enumerate(remarks, start=1)]
    return "\n".join(["Critique:", *steps, f"Conclusion: {'wrong' if flaw else 'right'} [END]"])


def sft_row(problem: Problem, rng: Random) -> Row:
    return {"prompt": problem.question, "completion": "\n" + problem.working}


def text_row(problem: Problem, rng: Random) -> Row:
    """A document as the world has them: two in five say something wrong."""
    return {"text": f"{problem.question}\n{_careless(problem, rng)}"}


def careless_row(problem: Problem, rng: Random) -> Row:
    """As `sft_row`, by somebody who gets two in five wrong."""
    return {"prompt": problem.question, "completion": "\n" + _careless(problem, rng)}


def _careless(problem: Problem, rng: Random) -> str:
    return flawed(problem, rng).working if rng.random() < WRONG else problem.working


def pair_row(problem: Problem, rng: Random) -> Row:
    flaw = flawed(problem, rng)
    return {
        "prompt": problem.question,
        "chosen": "\n" + problem.working,
        "rejected": "\n" + flaw.working,
        "flaw": flaw.kind,
    }


def critique_row(problem: Problem, rng: Random) -> Row:
    """Every other answer is right, on average."""
    flaw = flawed(problem, rng) if rng.random() < 0.5 else None
    return {
        "question": problem.question,
        "answer": flaw.working if flaw else problem.working,
        "critique": critique(problem, flaw),
        "verdict": "wrong" if flaw else "right",
        "flaw": flaw.kind if flaw else "none",
    }


def prompt_row(problem: Problem, rng: Random) -> Row:
    return {"prompt": problem.question, "answer": problem.answer}


def eval_row(problem: Problem, rng: Random) -> Row:
    return {"question": problem.question, "answer": problem.answer}


class Table(NamedTuple):
    """One file of rows."""

    row: Callable[[Problem, Random], Row]
    split: Split
    size: int
    make: Callable[[Random], Problem] = word_problem


TABLES: dict[str, Table] = {
    "texts.jsonl": Table(text_row, "train", 5000),
    "sft.jsonl": Table(sft_row, "train", 5000),
    "sft.heldout.jsonl": Table(sft_row, "heldout", 200),
    "critiques.jsonl": Table(critique_row, "train", 5000),
    "critiques.heldout.jsonl": Table(critique_row, "heldout", 200),
    "pairs.jsonl": Table(pair_row, "train", 10_000),
    "pairs.heldout.jsonl": Table(pair_row, "heldout", 400),
    "prompts.jsonl": Table(prompt_row, "train", 1000),
    "eval.jsonl": Table(eval_row, "eval", 200),
    "sums/sft.jsonl": Table(careless_row, "train", 7000, plain_sum),
    "sums/pairs.jsonl": Table(pair_row, "train", 7000, plain_sum),
    "sums/pairs.heldout.jsonl": Table(pair_row, "heldout", 200, plain_sum),
    "sums/prompts.jsonl": Table(prompt_row, "train", 2000, plain_sum),
    "sums/eval.jsonl": Table(eval_row, "eval", 200, plain_sum),
}


def take(seed: int, file: str) -> list[Problem]:
    """The problems behind the rows of one file, in the same order."""
    table = TABLES[file]
    return list(islice(problems(seed, file, table.split, table.make), table.size))


def rows(seed: int, file: str) -> list[Row]:
    """The rows of one file of TABLES; equal seeds give equal rows."""
    rng = Random(seed_for(seed, "rows", file))
    return [TABLES[file].row(problem, rng) for problem in take(seed, file)]
