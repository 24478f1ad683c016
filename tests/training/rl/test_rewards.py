"""What responses are worth: functions and endpoints that are well, and those that are not;
reward models of another tokenizer."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from tests.support.raw_server import CUT, ODD_JSON, OK, RawServer, dripping, whole
from tests.support.training_fixtures import phase_of
from training.config import RewardSource
from training.errors import InputError, ServiceError
from training.process.distributed import RankInfo

pytestmark = pytest.mark.cpu


def response(text, prompt="Q: 1 + 1 = ", **row):
    from training.rl.experience import Response

    ids = np.array([5, 6, 7], np.int64)
    return Response(
        place=0, number=0, sample=0, prompt=ids, tokens=ids, ended=True, row={"prompt": prompt, **row}, text=text
    )


@pytest.fixture
def judge(tiny):
    """judge(source) -> what scores responses."""
    from training.rl.rewards import opened

    phase = phase_of(tiny, "ppo", reward="-", batch=4)
    return lambda **source: opened(RewardSource(**source), phase, RankInfo(rank=0, size=1))


def test_a_function_sees_the_columns_of_the_rows(judge, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, answer, **others):\n"
        "    assert prompts == ['Q: 1 + 1 = '] * 2 and others['source'] == ['a', None]\n"
        "    return [c == a for c, a in zip(completions, answer)] and [1, 0.5]\n"
    )
    scores = judge(path=f"{tmp_path}/mine.py:right")([response("2", answer="2", source="a"), response("3", answer="2")])
    assert scores == [1.0, 0.5]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"raised ZeroDivisionError: division by zero"),
        ("gives_nan", r"gave nan for the response 'b'; expected a finite number"),
        ("gives_text", r"gave 'good' for the response 'a'; expected a finite number"),
        ("gives_too_few", r"was asked for 2 scores and gave 1"),
        ("gives_nothing", r"was asked for 2 scores and gave a NoneType"),
        ("hangs", r"has not answered within 0.2 s"),
    ],
)
def test_functions_that_are_not_well_are_told_of(judge, function, message):
    from training.rl.rewards import RewardError

    with pytest.raises(RewardError, match=message):
        judge(path=f"tests.support.some_rewards:{function}", timeout=0.2)([response("a"), response("b")])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.support.some_rewards:nothing", "cannot be imported: AttributeError"),
        ("tests.no_such_module:score", "cannot be imported: ModuleNotFoundError"),
        ("/nowhere/mine.py:score", "there is no file /nowhere/mine.py"),
        ("tests.support.some_rewards:NUMBER", "NUMBER is no function"),
    ],
)
def test_functions_that_are_not_there_are_told_of(judge, path, message):
    with pytest.raises(InputError, match=message):
        judge(path=path)


@pytest.fixture
def endpoint():
    """A server on loopback; `answers` are what it does next, the last one again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            do = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            status, answer = do(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = [], [lengths]
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def lengths(body):
    return 200, json.dumps({"scores": [len(text) for text in body["completions"]]})


def away(body):
    return 503, "later"


def slow(body):
    time.sleep(1)
    return lengths(body)


def test_an_endpoint_gets_all_responses_at_once(judge, endpoint):
    assert judge(path=endpoint.url)([response("a"), response("bcd")]) == [1.0, 3.0]
    (body,) = endpoint.asked
    assert body["prompts"] == ["Q: 1 + 1 = "] * 2
    assert body["rows"][0] == {"prompt": "Q: 1 + 1 = "}


def test_an_endpoint_that_is_away_is_asked_again(judge, endpoint):
    endpoint.answers = [away, lengths]
    assert judge(path=endpoint.url)([response("abcd")]) == [4.0]
    assert len(endpoint.asked) == 2


def test_an_endpoint_that_refuses_is_not(judge, endpoint):
    from training.rl.rewards import RewardError

    endpoint.answers = [lambda body: (400, "no")]
    with pytest.raises(RewardError, match=r"cannot be had \(1 try\): HTTP 400: no"):
        judge(path=endpoint.url)([response("a")])


@pytest.fixture
def hasty(monkeypatch):
    """Two tries without pauses."""
    from training.rl import reward_functions

    for name, value in (("_TRIES", 2), ("_PATIENCE_S", 0.0), ("_LONGEST_PAUSE_S", 0.01)):
        monkeypatch.setattr(reward_functions, name, value)


def test_an_endpoint_that_is_too_slow_is_given_up(judge, endpoint, hasty):
    endpoint.answers = [slow]
    with pytest.raises(ServiceError, match=r"cannot be had \(2 tries\): no whole answer within 0.1 s"):
        judge(path=endpoint.url, timeout=0.1)([response("a")])


def test_an_endpoint_that_cuts_its_replies_is_asked_again(judge, monkeypatch):
    monkeypatch.setattr("training.rl.reward_functions._LONGEST_PAUSE_S", 0.01)
    odd = [*CUT.values(), dripping(OK + b"Content-Length: 1000\r\n\r\n")]
    with RawServer(*odd, whole({"scores": [0.5]})) as server:
        assert judge(path=server.url, timeout=1)([response("a")]) == [0.5]
        assert server.asked == len(odd) + 1


@pytest.mark.parametrize("body", ODD_JSON)
def test_an_answer_of_another_form_is_told_of(judge, hasty, body):
    from training.rl.rewards import RewardError

    with RawServer(whole(ODD_JSON[body])) as server:
        with pytest.raises(RewardError, match=r"2 tries.*its answer is no .\"scores\""):
            judge(path=server.url)([response("a")])
        assert server.asked == 2


@pytest.mark.parametrize("score", [b"1e999", b"-1e999", b"NaN", b"1" * 400, b'"1"', b"[]", b"{}"])
def test_a_score_that_is_no_finite_number_is_told_of(judge, score):
    from training.rl.rewards import RewardError

    with (
        RawServer(whole(b'{"scores": [%s]}' % score)) as server,
        pytest.raises(RewardError, match="expected a finite number"),
    ):
        judge(path=server.url)([response("a")])


def test_sequences_of_unlike_lengths_are_scored_as_each_alone():
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from training.models.scoring import score

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = LlamaForSequenceClassification(LlamaConfig(vocab_size=50, num_labels=1, pad_token_id=0, **shape)).eval()
    lengths = np.random.default_rng(2).integers(1, 300, 20).tolist()
    sequences = [np.arange(length) % 49 + 1 for length in [*lengths, 600]]
    alone = [score(lm, [each])[0] for each in sequences]
    # fp32, products of other shapes.
    assert score(lm, sequences) == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert score(lm, []) == []


def test_a_sequence_with_more_tokens_than_the_model_has_positions_is_refused():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from training.models.scoring import score

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=12, num_labels=1, pad_token_id=0)
    lm = GPT2ForSequenceClassification(config).eval()
    assert len(score(lm, [np.arange(1, 13)])) == 1
    with pytest.raises(InputError, match="has 13 tokens, the model has 12 positions"):
        score(lm, [np.arange(1, 4), np.arange(1, 14)])


ASKED = [{"role": "user", "content": "1 + 1 = "}]


def test_for_a_conversation_a_completion_is_a_list_of_one_message(judge, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, answer, **others):\n"
        "    assert prompts == [[{'role': 'user', 'content': '1 + 1 = '}]] * 2\n"
        "    assert [c[0]['role'] for c in completions] == ['assistant'] * 2\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]\n"
    )
    asked = [response("2", ASKED, answer="2"), response("3", ASKED, answer="2")]
    assert judge(path=f"{tmp_path}/mine.py:right")(asked) == [1.0, 0.0]


def test_columns_with_the_names_of_arguments_are_left_out(judge, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    assert columns == {'completion_ids': [[5, 6, 7]], 'models': ['a']}, columns\n"
        "    return [len(text) for text in completions]\n"
    )
    row = {"completions": [{"response": "1"}], "trainer_state": 1, "completion_ids": 2, "models": "a"}
    assert judge(path=f"{tmp_path}/mine.py:score")([response("four", **row)]) == [4.0]


def test_a_function_gets_what_it_has_parameters_for(judge, tmp_path):
    (tmp_path / "mine.py").write_text("def score(completions, hint, log_extra=None):\n    return [len(hint[0])]\n")
    assert judge(path=f"{tmp_path}/mine.py:score")([response("x", answer="2", hint="abc")]) == [3.0]
    (tmp_path / "rare.py").write_text("def score(completions, hint):\n    return [float(hint == [None])]\n")
    assert judge(path=f"{tmp_path}/rare.py:score")([response("x", answer="2")]) == [1.0]


@pytest.mark.parametrize(
    "returned",
    [
        "np.array([1.5, 2.5])",
        "(np.float32(1.5), np.array(2.5))",
        "torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True)",
        "torch.tensor([[1.5], [2.5]])",
        "[torch.tensor(1.5), torch.tensor([2.5])]",
        "(score for score in (1.5, 2.5))",
    ],
)
def test_functions_may_return_arrays_and_tensors(judge, tmp_path, returned):
    (tmp_path / "mine.py").write_text(
        f"import numpy as np\nimport torch\ndef score(completions, **others):\n    return {returned}\n"
    )
    assert judge(path=f"{tmp_path}/mine.py:score")([response("a"), response("b")]) == [1.5, 2.5]


def test_true_and_false_are_one_and_zero(judge, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\ndef score(completions, **others):\n    return [True, np.bool_(False), None]\n"
    )
    scores = judge(path=f"{tmp_path}/mine.py:score")([response("a"), response("b"), response("c")])
    assert scores == pytest.approx([1.0, 0.0, float("nan")], nan_ok=True)


def test_a_coroutine_function_is_waited_for(judge, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "loops = set()\n"
        "async def score(completions, **others):\n"
        "    await asyncio.sleep(0)\n"
        "    loops.add(asyncio.get_running_loop())\n"
        "    return [len(loops)] * len(completions)\n"
    )
    score = judge(path=f"{tmp_path}/mine.py:score")
    assert [score([response("a")]), score([response("b")])] == [[1.0], [1.0]]


def test_none_is_no_vote_but_somebody_has_to_give_one(tiny, tmp_path):
    from training.rl.frozen_roles import RewardRole
    from training.rl.rewards import RewardError

    (tmp_path / "mine.py").write_text(
        "def even(completions, **others):\n    return [1.0 if int(c) % 2 == 0 else None for c in completions]\n"
        "def small(completions, **others):\n    return [0.5 if int(c) < 5 else None for c in completions]\n"
    )
    sources = [{"path": f"{tmp_path}/mine.py:even", "weight": 2.0}, {"path": f"{tmp_path}/mine.py:small"}]
    judges = RewardRole(RankInfo(rank=0, size=1), phase_of(tiny, "ppo", reward=sources, batch=4), "")
    judges.setup()
    assert judges.scores([response("2"), response("3"), response("8")]) == [2.5, 0.5, 2.0]
    with pytest.raises(RewardError, match=r"no reward gave a number for the response '7' to .*1 \+ 1"):
        judges.scores([response("2"), response("7")])


def test_several_rewards_are_weighted(tiny):
    from training.rl.frozen_roles import RewardRole

    sources = [
        {"path": "tests.support.some_rewards:nines"},
        {"path": "tests.support.some_rewards:length", "weight": -0.5},
    ]
    judges = RewardRole(RankInfo(rank=0, size=1), phase_of(tiny, "ppo", reward=sources, batch=4), "")
    judges.setup()
    assert judges.scores([response("99ab"), response("")]) == [0.0, 0.0]
    assert judges.scores([response("9")]) == [0.5]
    assert judges.scores([]) == []


# ── other tokenizers ──


@pytest.fixture(scope="module")
def other_words(tiny, tmp_path_factory):
    """The same model with another tokenizer."""
    import shutil

    from tests.support.training_fixtures import _tokenizer

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny / "model", folder)
    _tokenizer(["other words altogether make for other tokens " * 9]).save_pretrained(folder)
    return folder


def test_a_critic_of_another_tokenizer_is_refused(tiny, other_words):
    from training.rl.critic import Critic

    with pytest.raises(InputError, match=r"critic: the critic would read the policy's tokens as others"):
        Critic(RankInfo(rank=0, size=1), phase_of(tiny, "ppo", reward="-", batch=4, critic=str(other_words)), "")


def test_a_reward_model_of_another_tokenizer_reads_the_text(tiny, other_words, train, tmp_path):
    """Its score is that of the text in its own tokens; the policy's tokens mean other words to it."""
    from training.checkpoint.export import export
    from training.evaluation.evaluator import RewardScorer
    from training.rl.rewards import opened
    from training.storage import open_storage

    model = {"path": str(other_words), "dtype": "fp32"}
    learnt = train(1, recipe="reward", model=model, max_steps=2)
    export(learnt.last, open_storage(tmp_path / "reward"), phase_of(tiny, "reward", model=model))
    judge = opened(
        RewardSource(path=str(tmp_path / "reward")),
        phase_of(tiny, "ppo", reward="-", batch=4),
        RankInfo(rank=0, size=1),
    )
    asked = [response("21 and so it is", prompt="Q: 20 + 1 = "), response("5")]
    prompts = ["Q: 20 + 1 = ", "Q: 1 + 1 = "]
    assert judge(asked) == pytest.approx(
        RewardScorer(str(tmp_path / "reward")).rewards(prompts, ["21 and so it is", "5"])
    )
