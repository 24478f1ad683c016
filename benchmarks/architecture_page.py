"""Writes docs/reference/models.md: what the sweep over all architectures has found, as a table for readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version

from benchmarks.architecture_columns import ANOTHER_WAY, COLUMNS, FAULTS, YES, Architecture, Cell
from benchmarks.record import ROOT

PAGE = ROOT / "docs" / "reference" / "models.md"
_LONGEST_REASON = 160
_MEANINGS = {
    "SFT": "the losses of two steps with one sample in a micro-batch",
    "padded": "the loss with all samples in one micro-batch, a row each",
    "packed": "the loss with `pack: true`; and a change of one sample changes no bit of the logits of the others",
    "LoRA": (
        "adapters on all linear layers: the loss, the gradients of a step, and the loss with the adapter that is "
        "written"
    ),
    "merge": "the adapter merged into the weights, by `muster export --merge` and by `muster generate`",
    "reward": "pairs: the loss in training and evaluation, and the scores of the model that is written",
    "generate": "greedy texts of prompts of unlike lengths in one batch",
    "export": "the model that a run writes, loaded by transformers: its weights after two steps, and their logits",
}


def write(found: Sequence[Architecture]) -> None:
    PAGE.write_text(text_of(found, version("transformers"), date.today()), encoding="utf-8")


def text_of(found: Sequence[Architecture], transformers: str, day: date) -> str:
    """The whole page."""
    built = [each for each in found if not each.not_built]
    notes = _Notes()
    table = list(_table(built, notes))
    lines = [
        *_introduction(transformers, day),
        *_counts(built),
        *table,
        *notes.lines(),
        *_layers(built),
        *_others(found),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _introduction(transformers: str, day: date) -> Iterator[str]:
    yield from (
        "# Models",
        "",
        f"What works with which causal architecture of transformers {transformers}. Written on {day.isoformat()} by "
        "`python -m benchmarks architectures`, which",
        "takes every architecture that can be built tiny through Muster's own commands on a CPU, in fp32, and compares "
        "with transformers and PEFT alone,",
        "row by row, with eager attention. Losses and scores are equal to a relative 1e-5, generated texts are equal "
        "exactly.",
        "The models are random and small, and they run on a CPU: the page says nothing of CUDA kernels, of bf16, or of "
        "how well a model learns.",
        "",
        "| column | what is compared |",
        "|---|---|",
        *(f"| {name} | {_MEANINGS[name]} |" for name in COLUMNS),
        "",
        "**yes**: equal. **another way**: equal; Muster does not take its usual route for this architecture, and says "
        "so in the words of the note. **refused**: Muster does",
        "not do it, and says so in the words of the note before it trains.",
        "",
    )


def _counts(built: Sequence[Architecture]) -> Iterator[str]:
    yield f"## {len(built)} architectures"
    yield ""
    yield "| " + " | ".join(["", *COLUMNS]) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for verdict in dict.fromkeys([YES, ANOTHER_WAY, "refused", *FAULTS]):
        counts = [sum(each.cells[name].verdict == verdict for each in built) for name in COLUMNS]
        if any(counts):
            yield f"| {verdict} | " + " | ".join(map(str, counts)) + " |"
    yield ""


def _table(built: Sequence[Architecture], notes: _Notes) -> Iterator[str]:
    yield "| " + " | ".join(["`model_type`", *COLUMNS]) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for each in built:
        yield "| " + " | ".join([f"`{each.model_type}`", *(notes.cell(each.cells[name]) for name in COLUMNS)]) + " |"
    yield ""


class _Notes:
    """What is said of cells that are no plain yes, each text once, by number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def cell(self, cell: Cell) -> str:
        if not cell.detail:
            return cell.verdict
        number = self._numbers.setdefault(_in_a_table(cell.detail), len(self._numbers) + 1)
        return f"{cell.verdict} ({number})"

    def lines(self) -> Iterator[str]:
        if self._numbers:
            yield "## Notes"
            yield ""
            yield from (f"{number}. {text}" for text, number in self._numbers.items())
            yield ""


def _in_a_table(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _layers(built: Sequence[Architecture]) -> Iterator[str]:
    """Which linear layers get adapters."""
    by_layers: dict[str, list[str]] = {}
    for each in built:
        if layers := each.cells["LoRA"].layers:
            by_layers.setdefault(layers, []).append(f"`{each.model_type}`")
    if by_layers:
        yield from ("## Linear layers that `lora.targets: all-linear` adapts", "", "| layers | of |", "|---|---|")
        yield from (f"| {layers} | {', '.join(types)} |" for layers, types in sorted(by_layers.items()))
        yield ""


def _others(found: Sequence[Architecture]) -> Iterator[str]:
    """What nothing is known of."""
    if any(each.not_built for each in found):
        yield from ("## Not looked at, because no tiny model could be built", "", "| `model_type` | why |", "|---|---|")
        for each in found:
            if each.not_built:
                yield f"| `{each.model_type}` | {_shortened(_in_a_table(each.not_built))} |"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
