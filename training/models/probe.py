"""Finds out what a model's code can do, with a small copy of it on the CPU: `python -m training.models.probe SETTINGS`
(JSON of path and trust_remote_code).

Equality is to a relative 1e-5 of the largest logit, in fp32. That a sample does not see another is stricter: with the
other one changed its logits stay the same bit for bit; or, in a mixture of experts, where the number of tokens of an
expert shows in the rounding, the gradient is zero.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import Model
from training.data.batching import SDPA_VARLEN
from training.data.collate import Sample, collate
from training.errors import InputError
from training.estimate import model_traits as known_traits
from training.estimate import transformers_compat
from training.estimate.model_traits import Generation, Kernel, Traits
from training.models.shrink import ORDINARY_TOKENS, POSITIONS, ROTARY_LIMIT, shrunk, small_model

TOLERANCE = 1e-5
_ROUNDING = 1e-6
"""Of a mixture of experts."""
_CACHE_TOLERANCE = 1e-4
"""A state-space model computes one token by another sum than a sequence;
caches that are wrong differ by a hundredth."""
_LENGTHS = (5, 17, 11)
"""Of the samples: shorter and longer than the windows of a small copy."""
_NEW_TOKENS = 6

Ids = NDArray[np.int64]


def traits_for(model: Model) -> Traits:
    """What is known of the model in a folder or of that name. Probes it in this process if nothing is known yet."""
    from training.models import loading as models

    key = known_traits.key_for(model)
    if key is not None and (found := known_traits.known(key)) is not None:
        return found
    config = models.load_config(model)  # fetches it, if it is on the hub
    key = known_traits.key_for(model) or known_traits.key_of(config.to_dict())
    if (found := known_traits.known(key)) is not None:
        return found
    found = probe(config, trust_remote_code=model.trust_remote_code)
    known_traits.remember(known_traits.key_for(model) or key, found)  # the model's code may have been fetched since
    return found


def probe(config: Any, *, trust_remote_code: bool = False) -> Traits:
    """Probes a small copy of a model of this configuration."""
    from transformers import AutoModelForCausalLM

    name = _class_name(config)
    with _plainly():
        try:
            small = shrunk(config, rotary_limit=POSITIONS)
            lm = small_model(small, AutoModelForCausalLM, "eager", trust_remote_code=trust_remote_code)
            return _Probe(config, small, lm, trust_remote_code).traits()
        except Exception as error:  # the code of a model raises what it likes
            return Traits(architecture=name, unknown=_in_one_line(error))


def _class_name(config: Any) -> str:
    return next(iter(config.architectures or []), type(config).__name__.removesuffix("Config"))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _plainly() -> Iterator[None]:
    """For the length of a block: no warnings, random numbers that nobody else sees,
    and none of what the caller has switched on or off."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            transformers_compat.unsharded(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


class _Probe:
    """A small copy with eager attention, three samples and their logits, each alone."""

    def __init__(self, config: Any, small: Any, lm: Any, trust_remote_code: bool):
        self.config, self.small, self.lm, self.trust_remote_code = config, small, lm, trust_remote_code
        self.picks = any(getattr(small, name, None) is not None for name in ("index_topk", "keep_window_size"))
        """Attention is to the tokens of the highest scores: which these are can depend on what else is
        in the row, and on its length."""
        generator = np.random.default_rng(0)
        self.samples = [self._drawn(generator, length) for length in _LENGTHS]
        self.others = [self._drawn(generator, length) for length in _LENGTHS]
        """In place of the samples, to see whether it shows."""
        self.alone = [_logits(lm, [[ids]])[0][0] for ids in self.samples]
        if not all(logits.isfinite().all() for logits in self.alone):
            raise ValueError("the logits of the small copy are no numbers")

    @staticmethod
    def _drawn(generator: np.random.Generator, length: int) -> Ids:
        return generator.integers(ORDINARY_TOKENS.start, ORDINARY_TOKENS.stop, length)

    def traits(self) -> Traits:
        from training.models import attention

        attention.register()
        kernels = {name: self.kernel(name) for name in ("eager", "sdpa", SDPA_VARLEN)}
        for name in transformers_compat.GPU_KERNELS:
            has_it = transformers_compat.declares_kernel(self.lm, name)
            kernels[name] = Kernel(exists=has_it, right=has_it)
        return Traits(
            architecture=type(self.lm).__name__,
            causal=self.is_causal(),
            kernels=kernels,
            body=_holds(self.has_body),
            last_mlp=_holds(self.has_last_mlp),
            rotary_limit=self.rotary_limit(),
            classifier=_holds(self.has_classifier),
            generation=self.generation(),
        )

    # -- attention -----------------------------------------------------------------------------------------------------

    def kernel(self, name: str) -> Kernel:
        lm = self.with_kernel(name)
        if lm is None:
            return Kernel(exists=False)
        right = _holds(
            lambda: all(
                _equal(_logits(lm, [[ids]])[0][0], want) for ids, want in zip(self.samples, self.alone, strict=True)
            )
        )
        return Kernel(
            exists=True,
            right=right,
            pads=right and not self.picks and _holds(lambda: self.pads(lm)),
            packs=right and not self.picks and _holds(lambda: self.keeps_apart(lm, varlen=name == SDPA_VARLEN)),
            trees=right and not self.picks and name != "eager" and _holds(lambda: self.has_trees(name)),
        )

    def with_kernel(self, name: str) -> Any:
        """The small copy with an attention kernel; None if transformers has none for it."""
        from transformers import AutoModelForCausalLM

        if name == "eager":
            return self.lm
        if name == SDPA_VARLEN and not transformers_compat.accepts_own_kernels(self.lm):
            return None
        try:
            return small_model(self.small, AutoModelForCausalLM, name, trust_remote_code=self.trust_remote_code)
        except (ValueError, ImportError):
            return None

    def computes(self, rows: Sequence[Sequence[Ids]], got: Sequence[Sequence[Tensor]]) -> bool:
        """Whether the samples, so put into rows, have the logits that they have alone."""
        wanted = {ids.tobytes(): logits for ids, logits in zip(self.samples, self.alone, strict=True)}
        return all(
            _equal(part, wanted[ids.tobytes()])
            for row, parts in zip(rows, got, strict=True)
            for ids, part in zip(row, parts, strict=True)
        )

    def pads(self, lm: Any) -> bool:
        """Whether padding behind a sample changes nothing."""
        rows = [[ids] for ids in self.samples]
        return self.computes(rows, _logits(lm, rows))

    def keeps_apart(self, lm: Any, *, varlen: bool) -> bool:
        """Whether samples that share a row do not see each other, be they earlier or later,
        and padding behind them is no sample either."""
        short, long, middle = self.samples
        layouts = [[[long, short, middle]], [[short, middle, long]]]
        if not varlen:  # whose micro-batches are one row
            layouts += [[[middle, short], [long]], [[long, middle], [short]]]
        return self.takes_long_rows(lm) and all(self.apart_in(lm, rows) for rows in layouts)

    def takes_long_rows(self, lm: Any) -> bool:
        """Whether a row may have more tokens than the model has positions: some keep a mask of that size."""
        got = _logits(lm, [[*self.others, *self.samples]])[0][len(self.others) :]
        return all(_equal(one, alone) for one, alone in zip(got, self.alone, strict=True))

    def apart_in(self, lm: Any, rows: Sequence[Sequence[Ids]]) -> bool:
        """Whether that holds for one way to put the samples into rows."""
        logits = _logits(lm, rows)
        return self.computes(rows, logits) and all(self.unseen(lm, rows, i, logits) for i in range(len(self.samples)))

    def unseen(self, lm: Any, rows: Sequence[Sequence[Ids]], changed: int, before: Sequence[Sequence[Tensor]]) -> bool:
        """Whether another sample in the place of one does not show in the logits of the rest."""
        ids, other = self.samples[changed], self.others[changed]
        after = _logits(lm, [[other if each is ids else each for each in row] for row in rows])
        pairs = [
            (b, a)
            for row, parts_before, parts_after in zip(rows, before, after, strict=True)
            for each, b, a in zip(row, parts_before, parts_after, strict=True)
            if each is not ids
        ]
        if all(torch.equal(b, a) for b, a in pairs):
            return True
        return all(_equal(b, a, _ROUNDING) for b, a in pairs) and _no_gradient(lm, rows, ids)

    def is_causal(self) -> bool:
        ids = self.samples[1].copy()
        before = _logits(self.lm, [[ids]])[0][0]
        ids[-1] = self.others[1][-1]
        return _equal(_logits(self.lm, [[ids]])[0][0][:-1], before[:-1])

    def rotary_limit(self) -> int | None:
        """Of the model, where its small copy shows that the longest sample of a micro-batch matters."""
        small = shrunk(self.config, rotary_limit=ROTARY_LIMIT)
        if small.to_dict() == self.small.to_dict():
            return None
        from transformers import AutoModelForCausalLM

        short, long, _ = self.samples
        lm = small_model(small, AutoModelForCausalLM, "eager", trust_remote_code=self.trust_remote_code)
        alone = _logits(lm, [[short]])[0][0]
        together = _logits(lm, [[short], [long]])[0][0]
        return None if _equal(alone, together) else _original_length(self.config)

    # -- heads ---------------------------------------------------------------------------------------------------------

    def has_body(self) -> bool:
        with torch.no_grad():
            hidden = self.lm.get_decoder()(input_ids=_tensor(self.samples[1]), use_cache=False).last_hidden_state
            return _equal(self.lm.get_output_embeddings()(hidden)[0], self.alone[1])

    def has_last_mlp(self) -> bool:
        from training.models.sparse_last_mlp import last_mlp_at

        ids, places = _tensor(self.samples[1]), torch.tensor([2, 7, 16])
        body = self.lm.get_decoder()
        with torch.no_grad():
            whole = body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            with last_mlp_at(body, ids, places, known=True):
                sample_token = body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        return _equal(sample_token[places], whole[places])

    def classifier(self, attention: str) -> Any:
        from transformers import AutoModelForSequenceClassification

        small = shrunk(self.config, rotary_limit=POSITIONS)
        small.num_labels = 1
        small.pad_token_id = None
        return small_model(
            small, AutoModelForSequenceClassification, attention, trust_remote_code=self.trust_remote_code
        )

    def has_classifier(self) -> bool:
        from training.models.scoring import scores

        lm = self.classifier("eager")
        lm.traits = Traits(architecture="")
        with torch.no_grad():
            ours = [scores(lm, _tensor(ids), None, torch.tensor([len(ids) - 1])) for ids in self.samples]
            own = [lm(input_ids=_tensor(ids), use_cache=False).logits[0] for ids in self.samples]
        return _equal(torch.cat(ours), torch.cat(own))

    def has_trees(self, attention: str) -> bool:
        """Whether pairs that share what they begin with have the scores of their sequences alone."""
        from training.data.shared_prefix_pairs import mask_of, trees
        from training.models.scoring import scores

        lm = self.classifier(attention)
        lm.traits = Traits(architecture="")
        trunk, *ends = self.samples[1], self.samples[0], self.samples[2], self.others[0]
        sequences = [np.concatenate([trunk, end]) for end in ends] + [self.others[2]]
        pairs = [(sequences[0], sequences[1]), (sequences[2], sequences[3])]
        batch: Any = trees([pairs])
        mask = mask_of(batch["branches"])
        with torch.no_grad():
            together = scores(lm, batch["input_ids"], batch["position_ids"], batch["last_index"], mask=mask)
            alone = [scores(lm, _tensor(ids), None, torch.tensor([len(ids) - 1])) for pair in pairs for ids in pair]
        return _equal(together, torch.cat(alone))

    # -- generation ----------------------------------------------------------------------------------------------------

    def generation(self) -> Generation:
        from training.generation.sampling import Sampling, generate_all

        wanted = [self.greedily(ids) for ids in self.samples]
        prompts = [ids.tolist() for ids in self.samples]
        settings = Sampling(max_new_tokens=_NEW_TOKENS)
        ends = {wanted[0][2]}  # so that one ends before the others

        def right(batch: int) -> bool:
            written = generate_all(
                self.lm, [*prompts, prompts[1]], range(len(prompts) + 1), ends, settings, batch=batch
            )
            return [each.tokens for each in written] == [_up_to(tokens, ends) for tokens in [*wanted, wanted[1]]]

        self.lm.traits = Traits(architecture="", generation="batched")
        try:
            if self.picks or not _holds(self.has_cache):
                return "uncached"
            if _holds(self.pads_left) and _holds(lambda: right(batch=8)):
                return "batched"
            return "alone" if _holds(lambda: right(batch=1)) else "uncached"
        finally:
            del self.lm.traits

    def has_cache(self) -> bool:
        """Whether tokens that are read one by one behind others, with a cache,
        have the logits that the whole sequence has.

        The likeliest tokens alone would not show it: a cache that is a little wrong changes few of them.
        """
        ids, alone = _tensor(self.samples[1]), self.alone[1]
        cache, start = None, _LENGTHS[0]
        places = [slice(0, start), *(slice(place, place + 1) for place in range(start, len(alone)))]
        for place in places:
            positions = torch.arange(place.start, place.stop)[None]
            with torch.no_grad():
                out = self.lm(input_ids=ids[:, place], position_ids=positions, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if not _equal(out.logits[0].float(), alone[place], _CACHE_TOLERANCE):
                return False
        return True

    def pads_left(self) -> bool:
        """Whether the last logits of samples that are padded on the left, as for generation,
        are those that they have alone."""
        length = max(map(len, self.samples))
        ids = torch.tensor(np.stack([np.pad(each, (length - len(each), 0)) for each in self.samples]))
        mask = torch.tensor(np.stack([np.arange(length) >= length - len(each) for each in self.samples])).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            last = self.lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        return all(_equal(got, alone[-1]) for got, alone in zip(last, self.alone, strict=True))

    def greedily(self, ids: Ids) -> list[int]:
        """The likeliest tokens, without a cache."""
        written = ids
        for _ in range(_NEW_TOKENS):
            written = np.append(written, int(_logits(self.lm, [[written]])[0][0][-1].argmax()))
        tokens: list[int] = written[len(ids) :].tolist()
        return tokens


def _up_to(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _holds(claim: Callable[[], bool]) -> bool:
    """Whether something is so; not if it cannot be computed."""
    try:
        return claim()
    except Exception:
        return False


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids)[None]


def _logits(lm: Any, rows: Sequence[Sequence[Ids]]) -> list[list[Tensor]]:
    """Of every sample of every row its logits, computed as training computes them. [T, V] each"""
    with torch.no_grad():
        return _split(_computed(lm, rows), rows)


def _computed(lm: Any, rows: Sequence[Sequence[Ids]]) -> Tensor:
    samples: list[list[Sample]] = [[(ids, np.arange(len(ids)) > 0) for ids in row] for row in rows]
    batch = collate(samples)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if batch[name] is not None}
    logits_RLV: Tensor = lm(**inputs, use_cache=False).logits.float()
    return logits_RLV


def _split(logits_RLV: Tensor, rows: Sequence[Sequence[Ids]]) -> list[list[Tensor]]:
    return [
        list(logits[: sum(map(len, row))].split([len(ids) for ids in row]))
        for logits, row in zip(logits_RLV, rows, strict=True)
    ]


def _equal(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def _no_gradient(lm: Any, rows: Sequence[Sequence[Ids]], ids: Ids) -> bool:
    """Whether the embeddings of a sample have no influence on the logits of the others."""
    held: list[Tensor] = []

    def hold(module: Any, args: Any, out: Tensor) -> Tensor:
        held.append(out.detach().requires_grad_())
        return held[-1]

    handle = lm.get_input_embeddings().register_forward_hook(hold)
    try:
        parts = _split(_computed(lm, rows), rows)
    finally:
        handle.remove()
    rest = [
        part.square().sum()
        for row, of_row in zip(rows, parts, strict=True)
        for each, part in zip(row, of_row, strict=True)
        if each is not ids
    ]
    (gradient,) = torch.autograd.grad(torch.stack(rest).sum(), held[0])
    return not any(
        bool(part.any())
        for row, of_row in zip(rows, _split(gradient, rows), strict=True)
        for each, part in zip(row, of_row, strict=True)
        if each is ids
    )


def _original_length(config: Any) -> int:
    """Up to how many tokens a model's rotary factors are those that it begins with."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    lengths = [
        part["original_max_position_embeddings"] for part in parts if part.get("original_max_position_embeddings")
    ]
    return int(
        min([*lengths, getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings])
    )


def main() -> None:
    """Probe a model and keep the result. What is wrong with its folder goes to the standard output, as JSON."""
    torch.set_num_threads(1)
    try:
        traits_for(Model(**json.loads(sys.argv[1])))
    except InputError as error:
        print(json.dumps([[problem.where, problem.what, problem.message] for problem in error.problems]))
        sys.exit(known_traits.INPUT_WRONG)


if __name__ == "__main__":
    main()
