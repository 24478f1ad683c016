"""Continuing sequences: what is drawn depends on keys and positions alone."""

import numpy as np
import pytest

from tests.support.fork_group import in_a_process

pytestmark = pytest.mark.cpu
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18], [20, 21], [30, 31, 32], [40, 41, 42, 43]]


@pytest.fixture(scope="module")
def lm(tiny):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()


def texts(lm, batch=64, ends=(0,), prompts=PROMPTS, keys=None, **settings):
    from training.generation.sampling import Sampling, generate_all

    settings = Sampling(**{"max_new_tokens": 24, **settings})
    out = generate_all(lm, prompts, keys or range(len(prompts)), ends, settings, batch=batch)
    return [(one.tokens, one.ended) for one in out]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_batch_size_and_the_order_do_not_show(lm, temperature):
    expected = texts(lm, temperature=temperature)
    for batch in (1, 2, 5):
        assert texts(lm, batch, temperature=temperature) == expected
    keys = list(range(len(PROMPTS)))
    assert texts(lm, prompts=PROMPTS[::-1], keys=keys[::-1], temperature=temperature) == expected[::-1]


def test_equal_prompts_are_read_once(lm, monkeypatch):
    several = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[2]]
    alone = [
        text for i, prompt in enumerate(several) for text in texts(lm, prompts=[prompt], keys=[i], temperature=1.0)
    ]
    read = []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda **given: (read.append(given["input_ids"].shape), forward(**given))[1])
    assert texts(lm, prompts=several, temperature=1.0) == alone
    assert read[:2] == [(2, 8), (5, 1)]
    assert texts(lm, prompts=several, ends=range(0, 300, 3), temperature=1.0) == [
        text
        for i, prompt in enumerate(several)
        for text in texts(lm, prompts=[prompt], keys=[i], ends=range(0, 300, 3), temperature=1.0)
    ]


def test_greedy_is_what_transformers_generates(lm):
    import torch

    for prompt, (tokens, _) in zip(PROMPTS, texts(lm, ends=()), strict=True):
        out = lm.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
        assert tokens == out[0, len(prompt) :].tolist()


def test_rows_end_at_an_end_token_and_the_others_go_on(lm):
    whole = [tokens for tokens, _ in texts(lm, ends=(), temperature=1.0)]
    ends = {whole[0][3], whole[2][10], whole[4][0]}
    for tokens, (cut, ended) in zip(whole, texts(lm, ends=ends, temperature=1.0), strict=True):
        places = [place for place, token in enumerate(tokens) if token in ends]
        assert ended == bool(places)
        assert cut == tokens[: places[0] if places else None]


def test_other_keys_draw_otherwise(lm):
    first, second = (texts(lm, keys=[key] * len(PROMPTS), temperature=1.0) for key in (1, 2))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_tokens_are_drawn_with_their_probabilities():
    import torch

    from training.generation.sampling import Sampling, draw

    probabilities = torch.tensor([0.05, 0.5, 0.0, 0.3, 0.15])
    count = 20_000
    logits = probabilities.log().expand(count, -1)
    settings = Sampling(max_new_tokens=1, temperature=1.0)
    drawn = draw(logits, np.arange(count, dtype=np.uint64), 0, settings)
    shares = torch.bincount(drawn, minlength=5) / count
    # Five standard deviations of a share.
    assert (shares - probabilities).abs().max() <= 5 * (0.25 / count) ** 0.5
    assert shares[2] == 0
    hot = draw(logits, np.arange(count, dtype=np.uint64), 0, Sampling(max_new_tokens=1, temperature=0.5))
    squared = probabilities**2 / (probabilities**2).sum()
    assert (torch.bincount(hot, minlength=5) / count - squared).abs().max() <= 5 * (0.25 / count) ** 0.5
    nucleus = draw(logits, np.arange(count, dtype=np.uint64), 0, Sampling(max_new_tokens=1, temperature=1.0, top_p=0.6))
    assert (torch.bincount(nucleus, minlength=5) / count).tolist() == pytest.approx([0, 0.625, 0, 0.375, 0], abs=0.02)


def test_the_random_numbers_are_spread_evenly_and_do_not_hang_together():
    from training.generation.sampling import uniform

    keys = np.arange(4096, dtype=np.uint64)
    numbers = np.stack([uniform(keys, position) for position in range(64)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / numbers.size) ** 0.5
    by_key, by_position = np.corrcoef(numbers[:, :64]), np.corrcoef(numbers.T[:64])
    for correlations in (by_key, by_position):
        assert np.abs(correlations[~np.eye(len(correlations), dtype=bool)]).max() < 0.75  # 64 numbers each: sd 1/8
    assert len(np.unique(numbers)) == numbers.size


def _answers(phase, cache) -> list[tuple]:
    from training.process.distributed import RankInfo, join, set_environment
    from training.roles.language import LanguageTrainer

    rank_info = RankInfo(rank=0, size=1)
    set_environment(rank_info)
    join(rank_info)
    trainer = LanguageTrainer(rank_info, phase, cache)
    trainer.setup()
    return responses([trainer.answer(60.0, begin=True).rows[""]])


def responses(shares) -> list[tuple]:
    from training.evaluation.accuracy import in_order

    return [(row["number"], row["sample"], row["response"], row["ended"]) for row in in_order(shares)]


@pytest.mark.parametrize(("workers", "batch", "stage"), [(1, 7, 2), (2, 3, 3), (3, 64, 2)])
def test_workers_answer_alike_however_many_there_are(tiny, workers, batch, stage):
    """The same questions, seed and weights: the same responses, whatever the batch size, workers and ZeRO stage."""
    from tests.support.fork_group import ForkGroup
    from tests.support.training_fixtures import phase_of
    from training.group import results

    asked = {
        "data": str(tiny / "eval.jsonl"), "limit": 20, "max_new_tokens": 16, "samples": 2, "temperature": 1.0
    }  # fmt: skip
    expected = in_a_process(_answers, phase_of(tiny, "sft", eval=asked), str(tiny / "cache"))
    assert len({text for _, _, text, _ in expected}) > 30
    phase = phase_of(tiny, "sft", workers=workers, stage=stage, eval={**asked, "batch": batch})
    with ForkGroup(workers, "training.roles.language:LanguageTrainer", phase, str(tiny / "cache")) as group:
        results(group.call("setup"))
        shares = [share.rows[""] for share in results(group.call("answer", 60.0, begin=True))]
    assert responses(shares) == expected


# --- continuous batching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_continuous_batching_draws_the_same_tokens(lm, settings, monkeypatch):
    from training.generation import continuous_batching
    from training.generation.sampling import Sampling, generate_all

    # Room for a few at a time: prompts wait, and come in when others end.
    monkeypatch.setattr(continuous_batching, "_ON_CPU", {"page_size": 16, "num_blocks": 12, "max_batch_tokens": 32})
    prompts = [[5 + i, *range(3, 3 + i % 7)] for i in range(24)]
    chosen = Sampling(max_new_tokens=12, **settings)
    ends = set(range(20, 60))
    expected = generate_all(lm, prompts, range(24), ends, chosen)
    assert continuous_batching.generate_all(lm, prompts, range(24), ends, chosen) == expected
    assert {one.ended for one in expected} == {True, False} or settings["temperature"] == 0
    assert continuous_batching.generate_all(lm, [], [], ends, chosen) == []


def test_a_failure_of_continuous_batching_is_raised(lm, monkeypatch):
    from training.generation import continuous_batching
    from training.generation.sampling import Sampling

    def fail(self, scores, tensor_arg):
        raise ValueError("no numbers")

    monkeypatch.setattr(continuous_batching._Draw, "__call__", fail)
    with pytest.raises(RuntimeError, match="continuous batching failed: no numbers"):
        continuous_batching.generate_all(lm, [[5, 6]], [1], [2], Sampling(max_new_tokens=3))
