"""What is known of a model's code: which attention kernels it has, whether packed samples stay
apart, and so on. Free of torch.

A small copy of the model is probed for it once (training/models/probe.py); the result is kept as JSON, by the content
of the model's configuration and code and by the versions of the packages that compute it. What a model cannot do is
done in a slower way that is right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from training.config import Model, Phase
from training.data.batching import SDPA_VARLEN
from training.device import ACCELERATOR
from training.errors import InputError
from training.io.versions import versions_of
from training.model_folder import configured_in
from training.recipes import RECIPES

PASSED_ON = "MUSTER_MODEL_TRAITS"
"""Environment variable by which workers are given what is known of their models,
as JSON by key: they may lie on other machines."""
INPUT_WRONG = 2
"""Exit status of `python -m training.models.probe` for a model that cannot be loaded."""
_VERSION = 2
"""Of the probe: results of another one are not used."""
_ASIDE = frozenset(
    {
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "use_cache",
        "id2label",
        "label2id",
        "num_labels",
    }
)
"""Settings of a configuration that change nothing of what is probed."""

Generation = Literal["batched", "alone", "uncached"]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A model with one attention kernel."""

    exists: bool
    """transformers gives it to models of this class."""
    right: bool = False
    """A sample alone has the logits that eager attention gives. Of kernels
    that need a GPU this is not known, and taken as given."""
    packs: bool = False
    """Samples that share a row do not see each other, and have the logits that they have alone."""
    pads: bool = False
    """Padding behind a sample changes nothing."""
    trees: bool = False
    """Pairs as trees (training/data/shared_prefix_pairs.py) have the scores of their sequences alone."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """A model's code. The defaults are what is assumed of a model of which no small copy can be
    made: the slow way that is right."""

    architecture: str
    unknown: str = ""
    """Why it could not be probed, if it could not."""
    causal: bool = True
    """No token sees a later one."""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    body: bool = False
    """The logits are what the head makes of the hidden states of `get_decoder()`."""
    last_mlp: bool = False
    """The last layer ends with an MLP for each place (training/models/sparse_last_mlp.py)."""
    rotary_limit: int | None = None
    """Rotary factors of a sample depend on the longest sample of its micro-batch where
    that is longer than this. None: never."""
    classifier: bool = True
    """There is a sequence classifier of this kind, with a linear head called `score` on the last token.
    Unknown: as it turns out."""
    generation: Generation = "uncached"
    """batched: prompts of unlike lengths together, padded on the left; alone: one by one;
    uncached: the model has no cache that can be used."""

    def kernel(self, name: str) -> Kernel:
        return self.kernels.get(name, Kernel(exists=self.unknown != "" and name == "eager", right=True))

    def usable(self, name: str) -> bool:
        return self.kernel(name).exists and self.kernel(name).right

    def packs(self, attention: str) -> bool:
        """See `Kernel.packs`."""
        return all(kernel.packs for kernel in self._probed(attention))

    def pads(self, attention: str) -> bool:
        """See `Kernel.pads`."""
        return all(kernel.pads for kernel in self._probed(attention))

    def _probed(self, attention: str) -> list[Kernel]:
        """What the answer for a kernel rests on: itself, or for one
        that needs a GPU the kernels of torch that the model has."""
        here = [self.kernel(name) for name in ("eager", "sdpa") if self.kernel(name).exists]
        return [self.kernel(attention)] if attention in ("eager", "sdpa", SDPA_VARLEN) or not here else here

    def batches(self, longest: int) -> bool:
        """Whether texts of at most `longest` tokens can be written together."""
        return self.generation == "batched" and (self.rotary_limit is None or longest <= self.rotary_limit)

    def batches_continuously(self, attention: str, longest: int) -> bool:
        """Whether texts of at most `longest` tokens can be written by continuous batching,
        which packs them into one row."""
        kernel = "sdpa" if attention == SDPA_VARLEN else attention  # ours knows no pages
        return self.usable(kernel) and self.packs(kernel) and self.batches(longest)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> Traits:
        return cls(**{**stored, "kernels": {name: Kernel(**each) for name, each in stored["kernels"].items()}})


def attention_of(model: Model, traits: Traits, device: str, *, flash: bool = False) -> str:
    """The attention kernel of a model. auto: flash attention on GPUs that have it (`flash`), on CPUs ours; where the
    model has neither, sdpa; else eager.

    Raises InputError for a kernel that the model does not have or that computes something else.
    """
    if model.attention != "auto":
        if not traits.usable(model.attention):
            raise InputError.of("", _unusable(model.attention, traits, device), "model.attention")
        return model.attention
    wanted = {ACCELERATOR: ["flash_attention_2"] if flash else []}.get(device, [] if model.compile else [SDPA_VARLEN])
    return next((name for name in (*wanted, "sdpa") if traits.usable(name)), "eager")


def _unusable(name: str, traits: Traits, device: str) -> str:
    works = [each for each in ("eager", "sdpa", SDPA_VARLEN, "flash_attention_2") if traits.usable(each)]
    if traits.unknown:
        return (
            f"{traits.architecture} could not be examined ({traits.unknown}), so only eager attention is known to be "
            "right; set attention: eager, or leave it out"
        )
    why = (
        "computes other logits than eager attention"
        if traits.kernel(name).exists
        else "is not supported by transformers"
    )
    return f"{name} attention for {traits.architecture} {why}; use one of {', '.join(works)}, or leave it out"


def key_of(config: Mapping[str, Any], code: bytes = b"") -> str:
    """Names what a probe of this configuration comes to, with the code that comes with the model."""
    settings = {name: value for name, value in config.items() if name not in _ASIDE}
    versions = [versions_of([package]).get(package, "") for package in ("torch", "transformers")]
    text = json.dumps([_VERSION, versions, settings], sort_keys=True, default=str).encode()
    return hashlib.sha256(text + code).hexdigest()[:32]


def key_in(path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> str | None:
    """The key of the model in a folder or on the hub, or of the one below an adapter.
    None: there is no configuration here to be read."""
    folder = configured_in(path, revision)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    code = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py"))) if trust_remote_code else b""
    return key_of(config, code) if isinstance(config, dict) else None


def key_for(model: Model) -> str | None:
    """See `key_in`."""
    return key_in(model.path, trust_remote_code=model.trust_remote_code, revision=model.revision)


_known: dict[str, Traits] = {}
"""In this process, by key."""


def known(key: str) -> Traits | None:
    """What was found out before: by this process, by the one that drives the run, or on this machine."""
    if key not in _known and (stored := _passed_on().get(key) or _read(key)) is not None:
        with suppress(TypeError, KeyError, AttributeError):  # of another version
            _known[key] = Traits.of_json(stored)
    return _known.get(key)


def known_of(phase: Phase) -> Traits | None:
    """The same of the model of a phase."""
    key = key_for(phase.model)
    return None if key is None else known(key)


def remember(key: str, traits: Traits) -> None:
    """Keep it, for this process and for later ones on this machine."""
    _known[key] = traits
    file = _file(key)
    with suppress(OSError):  # it can be found out again
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(traits.json()), encoding="utf-8")
        partial.replace(file)


def pass_on(keys: Sequence[str]) -> None:
    """Let the workers that are started from now on know it."""
    os.environ[PASSED_ON] = json.dumps({key: traits.json() for key in keys if (traits := known(key)) is not None})


def _passed_on() -> dict[str, Any]:
    given = json.loads(os.environ.get(PASSED_ON) or "{}")
    return given if isinstance(given, dict) else {}


def _read(key: str) -> dict[str, Any] | None:
    try:
        stored = json.loads(_file(key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def _file(key: str) -> Path:
    return Path(os.environ.get("MUSTER_CACHE") or Path.home() / ".cache" / "muster") / "models" / f"traits-{key}.json"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the samples of a model may share micro-batches (training/data/batching.py),
    so that each is computed as it is alone."""

    packs: bool
    same_length_above: int | None


def rows_of(traits: Traits, attention: str, longest: int) -> Rows:
    """For samples of at most `longest` tokens."""
    limit = traits.rotary_limit if traits.rotary_limit is not None and longest > traits.rotary_limit else None
    return Rows(
        packs=traits.packs(attention) and limit is None,
        same_length_above=limit if traits.pads(attention) else 0,
    )


def refuse(phase: Phase, traits: Traits, attention: str, longest: int) -> None:
    """Raises InputError for what cannot be learnt with a model."""
    name = traits.architecture
    if not traits.causal:
        message = (
            f"a token of {name} sees later ones, so it cannot learn to predict them; take a causal language model, or "
            "set is_decoder: true in its config.json if it is one"
        )
        raise InputError.of("", message, "model.path")
    if RECIPES[phase.recipe].is_classifier and not traits.classifier:
        message = (
            f"transformers has no sequence classifier of {name} with a linear head called `score`, which a reward "
            "model needs; take a model of another kind"
        )
        raise InputError.of("", message, "model.path")
    above = rows_of(traits, attention, longest).same_length_above
    if phase.sequences_per_sample > 1 and above is not None:
        why = "could not be examined" if traits.unknown else "computes a sequence otherwise beside a longer one"
        way_out = f"set data.max_length to {above} or less" if above else "take a model of another kind"
        message = f"the two sequences of a pair differ in length, and {name} {why}; {way_out}"
        raise InputError.of("", message, "data.max_length" if above else "model.path")


def notes(phase: Phase, traits: Traits, attention: str, longest: int) -> Iterator[str]:
    """What goes another way than usual for a phase's model, and why."""
    name = traits.architecture
    wants_continuous = phase.rollout is not None and phase.rollout.continuous
    if wants_continuous and not traits.batches_continuously(attention, longest):
        yield (
            f"continuous batching would change what {name} writes: prompts of like length are batched instead "
            "(generation)"
        )
    if traits.unknown:
        yield (
            f"no small copy of {name} can be examined ({traits.unknown}): samples are computed one by one or with "
            "others of the same length, by eager attention and the model's own logits, which is slower and right"
        )
        return
    if phase.model.attention == "auto" and attention == "eager":
        yield f"{name} has no scaled_dot_product_attention in transformers: eager attention is used (model.attention)"
    if phase.data.pack and not traits.packs(attention):
        yield (
            f"samples of {name} that share a row see each other: each sample has a row of its own (data.pack), which "
            "changes the speed alone"
        )
    if not traits.pads(attention):
        yield f"padding changes what {name} computes: only samples of the same length are computed together"
    if traits.rotary_limit is not None and longest > traits.rotary_limit:
        yield (
            f"the rotary factors of {name} depend on the longest sample of a micro-batch above {traits.rotary_limit:,} "
            "tokens: each sample has a row of its own, and longer ones are computed with others of the same length"
        )


def traits_of(lm: Any) -> Traits:
    """What is known of a model that is loaded: what it was loaded with, else what its configuration says. Probes it in
    this process if nothing is known yet."""
    found = getattr(lm, "traits", None)
    if found is None:
        key = key_of(lm.config.to_dict())
        found = lm.traits = known(key) or _probed(lm.config, key)
    return found


def _probed(config: Any, key: str) -> Traits:
    # By name: the probe imports torch and much of what asks for traits.
    found: Traits = import_module("training.models.probe").probe(config)
    remember(key, found)
    return found
