"""The last MLP at the places that are looked at: the same losses and gradients, for less."""

import pytest

pytestmark = pytest.mark.cpu

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
PLACES = (3, 4, 5, 17, 38)


def family(name="Llama", *, classifier=False):
    """A tiny model in fp64: then only what is left out wrongly makes a difference."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SHAPE, num_labels=1)
    kind = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    return kind.from_config(config).double().train()


def micro(places):
    import torch

    torch.manual_seed(2)
    index = torch.tensor(places)
    return torch.randint(1, 50, (2, 20)), index, torch.randint(50, (len(index),))


def rows_of_last_mlp(lm):
    """How many places its MLPs have been given, in the order of the layers;
    as many as a row has if it was given rows."""
    seen = []
    for layer in lm.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[:-1].numel()))
    return seen


def learnt(lm, places, *, in_full=False):
    """The loss, and the gradients of all weights."""
    import torch
    from torch.nn import functional

    from training.models.loading import TokenLoss
    from training.models.scoring import scores

    ids, index, targets = micro(places)
    if hasattr(lm, "score"):
        values = scores(lm, ids, None, index)
        if in_full:
            values = (
                lm.score(lm.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[index])
                .squeeze(-1)
                .float()
            )
        loss = (values * torch.arange(1, len(index) + 1)).sum()
    elif in_full:
        logits = lm(input_ids=ids, use_cache=False).logits.flatten(0, 1)[index].float()
        loss = functional.cross_entropy(logits, targets, reduction="sum")
    else:
        loss = TokenLoss(lm)(ids, None, index, targets).sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in lm.parameters())]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("classifier", [False, True], ids=["tokens", "scores"])
def test_losses_and_gradients_are_those_of_the_whole(name, classifier):
    import torch

    lm = family(name, classifier=classifier)
    seen = rows_of_last_mlp(lm)
    ours = learnt(lm, PLACES)
    assert seen == [40, len(PLACES)]
    whole = learnt(family(name, classifier=classifier), PLACES, in_full=True)
    for one, other in zip(ours, whole, strict=True):
        # Logits and scores are measured in fp32, in products of the same shape.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_place_that_two_sequences_end_at_counts_twice():
    import torch

    twice = (3, 17, 17)
    ours = learnt(family(classifier=True), twice)
    whole = learnt(family(classifier=True), twice, in_full=True)
    for one, other in zip(ours, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("why", ["recomputed", "most are looked at", "unknown"])
def test_where_it_cannot_or_need_not_all_are_computed(why):
    from training.estimate.model_traits import Traits

    lm = family("Llama")
    if why == "unknown":
        lm.traits = Traits(architecture="Llama", body=True)
    if why == "recomputed":
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    seen = rows_of_last_mlp(lm)
    learnt(lm, tuple(range(39)) if why == "most are looked at" else PLACES)
    assert set(seen) == {40}


def test_the_model_is_as_it_was_afterwards():
    import torch

    lm = family()
    seen = rows_of_last_mlp(lm)
    learnt(lm, PLACES)
    seen.clear()
    with torch.no_grad():
        lm(input_ids=micro(PLACES)[0])
    assert seen == [40, 40]
    assert "forward" not in vars(lm.model.layers[-1].mlp)
