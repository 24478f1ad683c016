"""What Muster makes of one tiny model, by its own commands in this process,
against transformers and PEFT alone, row by row.

Each column of the table is a function. It runs `check` and `run --inline` on a job of its own and compares what comes
of it with a reference in fp32 with eager attention.
"""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tiny_models
from benchmarks.tiny_models import EOS, CannotBuild

LOSS_TOLERANCE = 1e-5
"""Relative, of losses and scores in fp32."""
WEIGHT_TOLERANCE = 5e-5
"""Absolute, of weights of which each has been changed by at most 0.2: rounding in another order of sums."""
LOGIT_TOLERANCE = 1e-4
"""Absolute, of logits of a size of 1 to 10."""
LEARNING_RATE, EPS = 0.1, 1.0
"""With a large eps a step of AdamW is nearly proportional to the gradient,
so that weights show whether gradients are right."""
UNMOVED = 1e-30
"""A learning rate that changes no weight."""
NEW_TOKENS = 12
KERNELS = ("eager", "sdpa")
"""Attention of transformers: what is compared with, and another one that shows how well a model is conditioned."""
_ILL_CONDITIONED = 10.0
"""What depends on gradients may differ by so many times as much as it does between these: of deep random models
that is more than a tolerance."""

YES, ANOTHER_WAY, REFUSED, WRONG, CRASH = "yes", "another way", "refused", "WRONG", "crash"
FAULTS = (WRONG, CRASH)


class Cell(NamedTuple):
    """What came of one column."""

    verdict: str
    detail: str = ""
    layers: str = ""
    """The linear layers that got adapters, in the column of LoRA."""


@dataclass
class Architecture:
    """What came of one architecture."""

    model_type: str
    cells: dict[str, Cell] = field(default_factory=dict)
    not_built: str = ""
    """Why there is no tiny model of it."""
    seconds: float = 0.0


class Wrong(Exception):
    """Something else than the reference came out, and nobody was told."""


class Refused(Exception):
    """Muster has refused, in words."""


@dataclass(frozen=True)
class Row:
    """A row of SFT data."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """A row of preference data."""

    prompt: str
    chosen: str
    rejected: str


def rows() -> list[Row]:
    """Of unlike lengths."""
    rng = random.Random(3)
    return [Row(tiny_models.text(p, rng), tiny_models.text(c, rng)) for p, c in ((5, 11), (8, 16), (12, 19))]


def pairs() -> list[Pair]:
    rng = random.Random(4)
    lengths = ((6, 9, 14), (11, 17, 8))
    return [Pair(*(tiny_models.text(length, rng) for length in each)) for each in lengths]


def prompts() -> list[str]:
    rng = random.Random(5)
    return [tiny_models.text(length, rng) for length in (5, 19, 11)]


class Finished(NamedTuple):
    """A run that came to its end."""

    folder: Path
    metrics: list[dict[str, Any]]
    notes: list[str]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def metric(self, name: str, step: int = 1) -> float:
        return float(next(row[name] for row in self.metrics if row["step"] == step and name in row))


class Case:
    """One tiny model, its data, and what transformers makes of them."""

    def __init__(self, model_type: str, folder: Path):
        self.model_type = model_type
        self.folder = folder
        self.base = folder / "model"
        self.rows, self.pairs, self.prompts = rows(), pairs(), prompts()
        tiny_models.make(model_type, self.base)
        self._try_reference()
        self._probe()
        _write(folder / "sft.jsonl", [asdict(row) for row in self.rows])
        _write(folder / "pairs.jsonl", [asdict(pair) for pair in self.pairs])
        self._outcomes: dict[str, Finished | Exception] = {}
        self._trained: dict[str, tuple[Any, list[float]]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base)

    def ids(self, text: str) -> Any:
        """As transformers' tokenizer has them, with an end. [1, L]"""
        import torch

        return torch.tensor([[*self.tokenizer(text)["input_ids"], EOS]])

    @property
    def first_ids(self) -> Any:
        return self.ids(self.rows[0].prompt + self.rows[0].completion)

    def nll(self, lm: Any) -> Any:
        """Of all rows the mean over the completions' tokens and ends of -log p,
        from the logits of each row alone. []"""
        import torch

        sums, targets = [], 0
        for row in self.rows:
            ids = self.ids(row.prompt + row.completion)
            first = len(self.tokenizer(row.prompt)["input_ids"])
            logits_LV = _logits_of(lm, ids)[0].float()
            sums.append(torch.nn.functional.cross_entropy(logits_LV[first - 1 : -1], ids[0, first:], reduction="sum"))
            targets += ids.shape[1] - first
        return sum(sums) / targets

    def _try_reference(self) -> None:
        """Raises CannotBuild for a model that transformers itself cannot run."""
        try:
            loss = self.nll(self.untrained).item()
        except Exception as error:
            raise CannotBuild(f"transformers cannot run it: {type(error).__name__}: {error}") from error
        if not math.isfinite(loss):
            raise CannotBuild(f"its loss in transformers is {loss}")

    def reference(self, folder: Path | None = None, kernel: str = "eager") -> Any:
        """A model as transformers loads it."""
        from transformers import AutoModelForCausalLM

        return _loaded(AutoModelForCausalLM, folder or self.base, kernel)

    @cached_property
    def untrained(self) -> Any:
        return self.reference()

    def _probe(self) -> None:
        """Has the model examined here: `check` would do it in a process of its own,
        which would import everything again."""
        from training.config import Model
        from training.models.probe import traits_for

        traits_for(Model(path=str(self.base)))

    def trained(self, kernel: str = "eager") -> tuple[Any, list[float]]:
        """The model after two steps of AdamW on all rows, and the losses of these steps."""
        if kernel not in self._trained:
            self._trained[kernel] = _trained(self, self.reference(kernel=kernel), steps=2)
        return self._trained[kernel]

    @property
    def loss(self) -> float:
        """Before any step."""
        return self.trained()[1][0]

    @property
    def alone(self) -> Finished:
        """The same two steps by Muster, one sample a micro-batch."""
        return self.run("alone", {"micro_batch": 1, "max_steps": 2})

    @property
    def adapted(self) -> Finished:
        """One step on all rows with LoRA, and an evaluation after it."""
        settings = {"micro_batch": 1, "data": {"eval": "sft.jsonl"}}
        return self.run("lora", settings, lora={"rank": 4, "alpha": 8})

    def run(self, name: str, settings: Mapping[str, Any], *, recipe: str = "sft", **model: Any) -> Finished:
        """`muster check` and `muster run --inline`, once a name. Raises Refused
        with what was said, or whatever comes out."""
        if name not in self._outcomes:
            try:
                self._outcomes[name] = self._run(name, settings, recipe, model)
            except Exception as error:
                self._outcomes[name] = error
        outcome = self._outcomes[name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _run(self, name: str, settings: Mapping[str, Any], recipe: str, model: Mapping[str, Any]) -> Finished:
        from rich.console import Console

        from launcher.driver import check, driver
        from launcher.process.exit_status import ExitStatus
        from launcher.runfolder import run_folder

        file = self._job(name, settings, recipe, model)
        said = io.StringIO()
        with self.refusals():
            found = check.check(file)
            checked = check.load(file, [], inline=True)
            status = driver.run_job(checked, inline=True, console=Console(file=said, width=1000), preflight=False)
        if status == ExitStatus.INVALID_INPUT:
            raise Refused(f"by the run, though `check` finds nothing: {self._without_paths(said.getvalue())}")
        if status != ExitStatus.DONE:
            raise RuntimeError(self._without_paths(said.getvalue()))
        folder = self.folder / "runs" / name / recipe
        notes = [
            *found["phases"][recipe]["notes"],
            *_notes(run_folder.json_rows(self.folder / "runs" / name / "events.jsonl")),
        ]
        return Finished(folder, list(run_folder.json_rows(folder / "metrics.jsonl")), list(dict.fromkeys(notes)))

    def phase(self, name: str, recipe: str = "sft") -> Any:
        """The settings of a job that was run."""
        from launcher.driver import check

        return check.load(self.folder / f"{name}.json", [], inline=True).phases[recipe]

    def _job(self, name: str, settings: Mapping[str, Any], recipe: str, model: Mapping[str, Any]) -> Path:
        data = {"train": "pairs.jsonl" if recipe == "reward" else "sft.jsonl", "template": "none", "max_length": 128}
        own = {name: value for name, value in settings.items() if name != "data"}
        phase = {
            "data": {**data, "shuffle": False, "pack": False, **settings.get("data", {})}, "max_steps": 1, "batch": 3,
            "learning_rate": LEARNING_RATE, "schedule": {"name": "constant", "warmup": 0}, "clip": None,
            "optimizer": {"eps": EPS}, **own,
        }  # fmt: skip
        job = {
            "name": name, "track": [], "model": {"path": "model", "dtype": "fp32", **model}, "sharding": {"stage": 0},
            "resources": {"workers": 1, "gpus_per_worker": 0, "threads": 1}, "phases": {recipe: phase},
        }  # fmt: skip
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(job))  # JSON is YAML
        return file

    def _without_paths(self, said: str) -> str:
        """The error among the lines of a run that has failed."""
        lines = said.replace(f"{self.folder}/", "").splitlines()
        start = next((number for number, line in enumerate(lines, 1) if line.endswith(" failed")), 0)
        return " ".join(line for line in lines[start:] if "`muster resume" not in line)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        from training.errors import MusterError

        try:
            yield
        except MusterError as error:
            raise Refused(self._without_paths(str(error))) from error


def _notes(events: Any) -> Iterator[str]:
    for event in events:
        if event["event"] == "training":
            yield from event["notes"]
        elif event["event"] == "warning":
            yield event["what"]


def _write(path: Path, made: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def _loaded(kind: Any, folder: Path, kernel: str = "eager") -> Any:
    """In fp32 with this attention, or where the model does not have it, with what it has."""
    import torch

    settings = {"dtype": torch.float32}
    try:
        return kind.from_pretrained(folder, attn_implementation=kernel, **settings).eval()
    except ValueError:
        return kind.from_pretrained(folder, **settings).eval()


def _logits_of(lm: Any, ids: Any) -> Any:
    """Of all places, or of a classifier of the last one, without a cache. [1, L] -> [1, L, V], [1, labels]"""
    return lm(input_ids=ids, use_cache=False).logits


def _trained(case: Case, lm: Any, steps: int) -> tuple[Any, list[float]]:
    import torch

    losses = []
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    for _ in range(steps):
        loss = case.nll(lm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return lm, losses


# -- columns -----------------------------------------------------------------------------------------------------------


def alone(case: Case) -> Cell:
    """SFT with one sample a micro-batch: the losses of two steps."""
    finished = case.alone
    _same("the loss of step 1", finished.metric("loss"), case.loss)
    _same("the loss of step 2", finished.metric("loss", 2), *(case.trained(kernel)[1][1] for kernel in KERNELS))
    return _told(finished)


def padded(case: Case) -> Cell:
    """SFT with all samples in one micro-batch, a row each."""
    finished = case.run("padded", {"micro_batch": 3})
    _same("the loss", finished.metric("loss"), case.loss)
    return _told(finished)


def packed(case: Case) -> Cell:
    """SFT with `pack: true`: the loss, and that no sample sees another."""
    finished = case.run("packed", {"data": {"pack": True}})
    _same("the loss", finished.metric("loss"), case.loss)
    if seen := _seen_by_others(case.phase("packed")):
        raise Wrong(seen)
    return _told(finished)


def lora(case: Case) -> Cell:
    """LoRA on all linear layers: loss, gradients of one step, and the adapter that is written, against PEFT."""
    finished = case.adapted
    _same("the loss of step 1", finished.metric("loss"), case.loss)
    _compare_with_peft(case, finished)
    if (experts := _experts(case.untrained)) and not any("expert" in note for note in finished.notes):
        raise Wrong(f"{experts} gets no adapter, and nobody is told")
    config = json.loads((finished.model / "adapter_config.json").read_text())
    return _told(finished)._replace(layers=", ".join(f"`{name}`" for name in sorted(config["target_modules"])))


def merged(case: Case) -> Cell:
    """The adapter merged in by `muster export --merge` and by whoever asks the model, against PEFT's own merging."""
    import torch

    from launcher.inference import export
    from launcher.runfolder import run_folder
    from training.models import loading as models

    adapter = case.adapted.model
    expected = _peft(case, adapter).merge_and_unload()
    with case.refusals():
        out = case.folder / "merged"
        export.export(
            run_folder.find(str(case.folder / "runs" / "lora")), phase=None, step=None, out=str(out), merge=True
        )
        asked: Any = models.for_inference(str(adapter))
    ids = case.first_ids
    for name, lm in (("exported", case.reference(out)), ("asked", asked)):
        with torch.no_grad():
            _close(f"logits of the model {name}", _logits_of(lm, ids), _logits_of(expected, ids))
    return Cell(YES)


def reward(case: Case) -> Cell:
    """Reward pairs: the loss in training and in evaluation, and the scores of the model that is written."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from training.evaluation.evaluator import RewardScorer

    settings = {"batch": 2, "learning_rate": UNMOVED, "data": {"eval": "pairs.jsonl", "pack": True}}
    finished = case.run("reward", settings, recipe="reward")
    lm: Any = _loaded(AutoModelForSequenceClassification, finished.model)
    expected = []
    for pair in case.pairs:
        for answer in (pair.chosen, pair.rejected):
            with torch.no_grad():
                expected.append(_logits_of(lm, case.ids(pair.prompt + answer))[0].item())
    differences = [chosen - rejected for chosen, rejected in zip(expected[::2], expected[1::2], strict=True)]
    loss = sum(math.log1p(math.exp(-each)) for each in differences) / len(differences)
    _same("the loss", finished.metric("loss"), loss)
    _same("the loss in evaluation", finished.metric("eval_loss"), loss)
    with case.refusals():
        judge = RewardScorer(str(finished.model))
    questions = [pair.prompt for pair in case.pairs for _ in range(2)]
    got = judge.rewards(questions, [answer for pair in case.pairs for answer in (pair.chosen, pair.rejected)])
    for one, other in zip(got, expected, strict=True):
        _same("a score", one, other)
    return _told(finished)


def generation(case: Case) -> Cell:
    """Greedy, three prompts of unlike lengths in a batch, against the largest logit of transformers without a cache."""
    from launcher.inference import generate as generating

    plan = generating.Plan(
        model=str(case.base), phase=None, step=None, prompts=case.prompts, file=None, limit=None, out=None, chat=False,
        max_new_tokens=NEW_TOKENS, temperature=0.0, top_p=1.0, samples=1, seed=0, batch=8, workers=1, as_json=True,
    )  # fmt: skip
    with case.refusals():
        got: Any = generating.generate(plan)
    for prompt, row in zip(case.prompts, got, strict=True):
        expected = _greedy(case.untrained, case.tokenizer(prompt)["input_ids"])
        text = case.tokenizer.decode(expected, skip_special_tokens=True)
        if (row["response"], row["tokens"]) != (text, len(expected)):
            raise Wrong(f"{prompt!r} is continued by {row['response']!r}, not {text!r}")
    return Cell(YES)


def exported(case: Case) -> Cell:
    """The model that the run of `alone` has written, loaded by transformers: the weights of the trained reference, and
    the logits that the configuration of the base makes of them (those of the reference itself may differ: rounding
    grows in deep random models).

    The reference goes through a file, too: some classes set a row of their embedding to zero whenever they are loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    finished = case.alone
    kind: Any = AutoModelForCausalLM
    lm, info = kind.from_pretrained(finished.model, dtype=torch.float32, output_loading_info=True)
    if odd := {name: sorted(map(str, keys)) for name, keys in info.items() if keys}:
        raise Wrong(f"transformers loads it with {odd}")
    models = [_written_and_loaded(case, kernel) for kernel in KERNELS]
    _compare_weights(lm.state_dict(), *(each.state_dict() for each in models))
    written, with_base = case.reference(finished.model), case.reference()
    with_base.load_state_dict(written.state_dict())
    with torch.no_grad():
        _close("logits", *(_logits_of(each, case.first_ids) for each in (written, with_base)))
    return Cell(YES)


def _written_and_loaded(case: Case, kernel: str) -> Any:
    folder = case.folder / f"trained-{kernel}"
    case.trained(kernel)[0].save_pretrained(folder)
    return case.reference(folder, kernel)


def _compare_weights(got: Mapping[str, Any], expected: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    if got.keys() != expected.keys():
        raise Wrong(f"other tensors: {', '.join(sorted(got.keys() ^ expected.keys()))}")
    for name, tensor in expected.items():
        _close(name, got[name], tensor, WEIGHT_TOLERANCE, again[name])


COLUMNS: dict[str, Callable[[Case], Cell]] = {
    "SFT": alone,
    "padded": padded,
    "packed": packed,
    "LoRA": lora,
    "merge": merged,
    "reward": reward,
    "generate": generation,
    "export": exported,
}


def examine(model_type: str, folder: Path) -> Iterator[tuple[str, Cell]]:
    """Each column's name and cell, as they come. Raises CannotBuild if there is no tiny model of this type."""
    case = Case(model_type, folder)
    for name, column in COLUMNS.items():
        yield name, _cell(column, case)
    shutil.rmtree(folder, ignore_errors=True)


def _cell(column: Callable[[Case], Cell], case: Case) -> Cell:
    try:
        return column(case)
    except Refused as refused:
        return Cell(REFUSED, str(refused).strip())
    except Wrong as wrong:
        return Cell(WRONG, str(wrong))
    except Exception as error:
        return Cell(CRASH, f"{type(error).__name__}: {error}")


def _told(finished: Finished) -> Cell:
    return Cell(ANOTHER_WAY, "; ".join(finished.notes)) if finished.notes else Cell(YES)


def _same(what: str, got: float, expected: float, again: float | None = None) -> None:
    """Raises Wrong unless they are equal to a relative LOSS_TOLERANCE, of numbers below 1 to an absolute one.
    `again`: as of `_close`."""
    tolerance = LOSS_TOLERANCE * max(1.0, abs(expected))
    if not abs(got - expected) <= max(
        tolerance, _ILL_CONDITIONED * abs(expected - again) if again is not None else 0.0
    ):
        raise Wrong(f"{what} is {got:.7g}, not {expected:.7g}")


def _close(what: str, got: Any, expected: Any, tolerance: float = LOGIT_TOLERANCE, again: Any = None) -> None:
    """Raises Wrong unless they are equal to the tolerance. `again`: the same by another kernel of transformers,
    where gradients come in."""
    if got.shape != expected.shape:
        raise Wrong(f"{what} has the shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    difference = _difference(got, expected)
    if not difference <= max(tolerance, _ILL_CONDITIONED * _difference(expected, again) if again is not None else 0.0):
        raise Wrong(f"{what} differs by {difference:.3g}")


def _difference(one: Any, other: Any) -> float:
    return (one.float() - other.float()).abs().max().item() if one.numel() else 0.0


def _greedy(lm: Any, prompt: list[int]) -> list[int]:
    """The plainest there is: the whole sequence again for every token."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + NEW_TOKENS:
            token = int(_logits_of(lm, torch.tensor([ids]))[0, -1].argmax())
            if token == EOS:
                break
            ids.append(token)
    return ids[len(prompt) :]


def _peft(case: Case, adapter: Path, kernel: str = "eager") -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(case.reference(kernel=kernel), str(adapter), is_trainable=True)


def _compare_with_peft(case: Case, finished: Finished) -> None:
    """The loss with the adapter after one step, and that step by PEFT's own gradients."""
    _same("the loss with the adapter", finished.metric("eval_loss"), case.nll(_peft(case, finished.model)).item())
    written = _ups(_peft(case, finished.model))
    expected, again = (_first_step(case, _peft(case, finished.model, kernel)) for kernel in KERNELS)
    for name, up in expected.items():
        _close(name, written[name], up, WEIGHT_TOLERANCE, again[name])


def _ups(lm: Any) -> dict[str, Any]:
    """The matrices B. Those called A have no gradient in the first step, since B is 0."""
    return {name: parameter for name, parameter in lm.named_parameters() if ".lora_B." in name}


def _first_step(case: Case, lm: Any) -> dict[str, Any]:
    """What the matrices B are after one step, by PEFT's gradients."""
    import torch

    ups = _ups(lm)
    with torch.no_grad():
        for parameter in ups.values():
            parameter.zero_()
    case.nll(lm).backward()
    gradients = {name: each.grad if each.grad is not None else torch.zeros_like(each) for name, each in ups.items()}
    return {name: -LEARNING_RATE * gradient / (gradient.abs() + EPS) for name, gradient in gradients.items()}


def _experts(lm: Any) -> str:
    """The name of a weight that holds several experts in one tensor; nothing if there is none."""
    return next((name for name, parameter in lm.named_parameters() if parameter.dim() == 3 and "expert" in name), "")


def _seen_by_others(phase: Any) -> str:
    """Which samples change their logits when another one in their micro-batch is changed; nothing if none does.

    Bit for bit, but for mixtures of experts: how many tokens an expert gets shows in the rounding, so there no gradient
    may reach the other sample.
    """
    import torch

    trainer, micro = _trainer_of(phase)
    order = [sample for row in micro for sample in row]
    before = _logits(trainer, micro)
    for changed in order if len(order) > 1 else ():
        after = _logits(trainer, micro, changed)
        others = [sample for sample in order if sample != changed]
        unlike = [sample for sample in others if not torch.equal(before[sample], after[sample])]
        if unlike and (not _rounding(before, after, unlike) or _gradient_reaches(trainer, micro, changed)):
            return f"sample {unlike[0]} sees sample {changed}"
    return ""


def _rounding(before: Mapping[int, Any], after: Mapping[int, Any], samples: Sequence[int]) -> bool:
    return all(
        _difference(before[sample], after[sample]) <= LOSS_TOLERANCE * before[sample].abs().max().item()
        for sample in samples
    )


def _gradient_reaches(trainer: Any, micro: list[list[int]], changed: int) -> bool:
    """Whether the logits of the other samples depend on the embedded tokens of one."""
    import torch

    embedded: list[Any] = []
    lm = trainer.engine.ds.module.lm
    handle = lm.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
    with torch.enable_grad():
        logits = _logits(trainer, micro)
        loss = sum(part.square().sum() for sample, part in logits.items() if sample != changed)
        (gradient_RLH,) = torch.autograd.grad(loss, embedded[0])
    handle.remove()
    row = next(number for number, row in enumerate(micro) if changed in row)
    lengths = [len(trainer.store[sample][0]) for sample in micro[row]]
    start = sum(lengths[: micro[row].index(changed)])
    return bool(gradient_RLH[row, start : start + lengths[micro[row].index(changed)]].any())


def _trainer_of(phase: Any) -> tuple[Any, list[list[int]]]:
    """A trainer that is set up, and the rows of its first micro-batch."""
    from launcher.runfolder.cache import cache_folder
    from launcher.workers.worker_set import _inline_groups
    from training.data.batching import partition_batch
    from training.recipes import RECIPES

    (group,) = _inline_groups(phase, RECIPES[phase.recipe].roles, (phase, str(cache_folder()))).values()
    trainer: Any = group.worker.roles[group.role]  # type: ignore[attr-defined]  # an InlineGroup
    trainer.setup()
    lengths = [len(trainer.store[sample][0]) for sample in range(len(trainer.store))]
    return trainer, partition_batch(lengths, 1, trainer.limits)[0][0]


def _logits(trainer: Any, micro: list[list[int]], changed: int | None = None) -> dict[int, Any]:
    """What the head says at the targets of each sample of a micro-batch [N, V];
    one of them may have another first token."""
    import torch

    store = [trainer.store[sample] for sample in range(len(trainer.store))]
    if changed is not None:
        ids, is_target = store[changed]
        other = ids.copy()
        other[0] = other[0] - 1 if other[0] > EOS + 1 else other[0] + 1
        store[changed] = other, is_target
    batch = trainer.collated(store, micro)
    seen: list[Any] = []
    module = trainer.engine.ds.module
    handle = module.lm.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.set_grad_enabled(torch.is_grad_enabled() and changed is None):
        module(**batch)
    handle.remove()
    logits = torch.cat([each.flatten(0, -2) for each in seen])
    at_targets = logits if len(logits) == len(batch["target_index"]) else logits[batch["target_index"]]
    order = [sample for row in micro for sample in row]
    parts = at_targets.split([int(trainer.store.target_counts[sample]) for sample in order])
    return dict(zip(order, parts, strict=True))
