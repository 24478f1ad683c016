"""Building data for critique fine-tuning, against a real server that misbehaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli.main import app
from launcher.inference import critique, teacher
from tests.support.raw_server import CUT as CUT_REPLIES
from tests.support.raw_server import ODD_JSON, OK, RawServer, dripping, whole
from tests.support.teacher_server import CUT, HANG, NONSENSE, TeacherServer

KEY = "sk-of-nobody-123"


@pytest.fixture(autouse=True)
def hasty(monkeypatch, tmp_path):
    """A folder to work in, and pauses of a moment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(teacher, "_LONGEST_PAUSE_S", 0.1)
    monkeypatch.setenv("TEACHER_KEY", KEY)


def rows(count=12):
    """Sums, every third of them wrong."""
    found = []
    for n in range(count):
        given = n + n + (1 if n % 3 == 0 else 0)
        found.append(
            {"question": f"What is {n} + {n}?", "right": str(n + n), "model_a": f"{n}+{n}={given}\n#### {given}"}
        )
    return found


def write(path: Path, given) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def judged(number, body):
    """A good teacher: it does the sum."""
    asked = body["messages"][-1]["content"]
    n = int(asked.split("What is ")[1].split(" ")[0])
    said = int(asked.rpartition("#### ")[2])
    return f"Critique: the sum is {n + n}.\nConclusion: {'right' if said == n + n else 'wrong'} [END]"


def muster(*words, capsys):
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in words])
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def command(server, out="cft.jsonl", *more):
    return [
        "critique", out, "--data", "rows.jsonl", "--column", "model_a", "--known", "right", "--teacher", server.url,
        "--teacher-model", "wise",
        "--key-env", "TEACHER_KEY", *more,
    ]  # fmt: skip


def written(out="cft.jsonl"):
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def test_data_that_the_recipe_can_learn_from(capsys, tiny):
    write(Path("rows.jsonl"), rows())

    def slowly(number, body):
        time.sleep(0.2)  # so that the next questions come meanwhile, on a busy machine too
        return judged(number, body)

    with TeacherServer(slowly) as server:
        status, out, _ = muster(*command(server), capsys=capsys)
        assert status == 0
        assert server.most_at_once > 1
        assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
        assert server.requests[0]["temperature"] == 0.3
    found = written()
    assert [row["verdict"] for row in found].count("wrong") == 4
    assert len(found) == 12
    assert "12 rows (8 right, 4 wrong)" in out
    from tests.support.training_fixtures import phase_of
    from training.data import files
    from training.data.prepare import check_rows

    phase = phase_of(tiny, "cft", data={"train": str(Path("cft.jsonl").absolute())})
    assert check_rows(files.expand("cft.jsonl", Path.cwd()), phase.data, ("critique",)).rows == 12


def test_no_key_is_written_anywhere(capsys):
    write(Path("rows.jsonl"), rows(3))
    with TeacherServer(lambda n, b: (401, {}, "no")) as server:
        status, out, err = muster(*command(server), capsys=capsys)
    assert status == 2
    assert "is the key right" in err
    everything = out + err + "".join(path.read_text() for path in Path().rglob("*") if path.is_file())
    assert KEY not in everything


def test_a_server_that_misbehaves(capsys):
    """429 with Retry-After, 500, a cut connection, a time-out and nonsense,
    each once for somebody: every row is there in the end."""
    write(Path("rows.jsonl"), rows())
    trouble = {
        0: (429, {"Retry-After": "0.05"}, ""),
        2: (500, {}, "oh"),
        4: CUT,
        6: HANG,
        8: NONSENSE,
        9: (503, {}, ""),
    }
    with TeacherServer(lambda n, body: trouble.get(n) or judged(n, body)) as server:
        status, _out, err = muster(*command(server, "cft.jsonl", "--timeout", "0.5"), capsys=capsys)
        assert status == 0, err
        assert len(server.requests) == 12 + len(trouble)
        assert set(server.asked.values()) == {1}  # nobody was paid twice
    assert len(written()) == 12


GOOD = "Critique: yes.\nConclusion: right [END]"


def said(text=GOOD, **usage):
    return whole({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage})


def ask_raw(server, capsys, *more):
    words = ["--parallel", "1", "--timeout", "1", *more]
    return muster(
        "critique", "cft.jsonl", "--data", "rows.jsonl", "--column", "model_a", "--teacher", server.url,
        "--teacher-model", "wise", *words,
        capsys=capsys,
    )  # fmt: skip


def test_a_server_that_cuts_its_replies(capsys):
    """In every way that there is, and one that sends a byte now and then for ever: every row is there in the end."""
    write(Path("rows.jsonl"), rows(2))
    odd = [*CUT_REPLIES.values(), dripping(OK + b"Content-Length: 1000\r\n\r\n")]
    with RawServer(said(), *odd, said()) as server:
        status, out, err = ask_raw(server, capsys)
        assert status == 0, out + err
        assert server.asked == 2 + len(odd)
    assert len(written()) == 2


def test_answers_of_another_form_cost_a_row_and_no_more(capsys):
    write(Path("rows.jsonl"), rows(len(ODD_JSON) + 3))
    half = json.dumps({"choices": [{"message": {"content": "\ud800"}}]}).encode()
    odd = [whole(body) for body in (*ODD_JSON.values(), half, b'{"choices": [{}]}') for _ in range(3)]
    with RawServer(*odd, said()) as server:
        status, out, err = ask_raw(server, capsys)
    assert status == 0, out + err
    assert len(written()) == 1
    assert f"{len(ODD_JSON) + 2} not critiqued yet" in out


@pytest.mark.parametrize("tokens", [-100_000, 0, True, "12", 1.5, [1], None])
def test_what_is_no_count_of_tokens_lifts_no_budget(capsys, tokens):
    write(Path("rows.jsonl"), rows(30))
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens}
    with RawServer(said(**usage)) as server:
        status, out, err = ask_raw(server, capsys, "--max-tokens", "1500", "--max-new-tokens", "60")
        assert status == 0, out + err
        assert 1 <= server.asked < 15
    assert "ended early" in out
    assert (out + err).count("bytes are counted as a token instead") == (tokens not in (None, 0))


@pytest.mark.parametrize("seconds", ["inf", "nan", "-5", "1e999", "Fri, 99 Foo 99999 00:00:00 GMT", "soon"])
def test_a_server_may_ask_to_wait_for_any_time(capsys, seconds):
    write(Path("rows.jsonl"), rows(1))
    busy = b"HTTP/1.1 429 Busy\r\nRetry-After: %s\r\nContent-Length: 0\r\n\r\n" % seconds.encode()
    with RawServer(busy, said()) as server:
        assert ask_raw(server, capsys)[0] == 0
        assert server.asked == 2


def test_what_does_not_hold_is_dropped_and_counted(capsys):
    write(Path("rows.jsonl"), [*rows(9), rows(1)[0]])

    def careless(number, body):
        asked = body["messages"][-1]["content"]
        if "What is 1 " in asked:
            return "I would rather not say."
        if "What is 2 " in asked:
            return "Critique: no.\nConclusion: wrong [END]"  # it is right
        return judged(number, body)

    with TeacherServer(careless) as server:
        _, out, _ = muster(*command(server), capsys=capsys)
    assert len(written()) == 7
    for told in ("1 no conclusion", "1 contradicts the known answer", "1 duplicate"):
        assert told in out


def test_going_on_asks_nobody_twice(capsys):
    write(Path("rows.jsonl"), rows(20))
    with TeacherServer(lambda n, body: judged(n, body) if n < 8 else (400, {}, "out of order")) as server:
        status, _, err = muster(*command(server, "cft.jsonl", "--parallel", "2"), capsys=capsys)
        assert status == 2
        assert "HTTP 400" in err
        done = sum(server.asked.values())
        assert done == 8
    with TeacherServer(judged) as server:
        assert muster(*command(server), capsys=capsys)[0] == 0
        assert len(server.requests) == 20 - done
        assert muster(*command(server), capsys=capsys)[0] == 0
        assert len(server.requests) == 20 - done
    assert len(written()) == 20


def test_an_interruption_keeps_what_is_paid_for():
    write(Path("rows.jsonl"), rows(30))

    def slow(number, body):
        time.sleep(0.3)
        return judged(number, body)

    with TeacherServer(slow) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *command(server, "cft.jsonl", "--parallel", "4")],
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # whoever runs the tests may have it ignored
        )
        deadline = time.monotonic() + 60
        while len(server.requests) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        kept = [json.loads(line) for line in Path("cft.jsonl.work/critiques.jsonl").read_text().splitlines()]
        assert len(kept) == sum(server.asked.values()) == len(server.requests)


def test_a_budget_is_not_passed(capsys):
    """150 tokens each by the server's account; a request may take 60 and what it reads."""
    write(Path("rows.jsonl"), rows(30))
    with TeacherServer(judged) as server:
        status, out, _ = muster(
            *command(server, "cft.jsonl", "--max-tokens", "2000", "--max-new-tokens", "60"), capsys=capsys
        )
        assert status == 0
        assert 5 <= len(server.requests) <= 2000 // 150 + 1
        asked = len(server.requests)
        assert "ended early" in out
        status, _, _ = muster(
            *command(
                server,
                "cft.jsonl",
                "--max-cost",
                "0.001",
                "--price-in",
                "1",
                "--price-out",
                "10",
                "--max-new-tokens",
                "60",
            ),
            capsys=capsys,
        )
        assert status == 0
        assert 0 < len(server.requests) - asked <= 2  # 0.0006 each


def test_a_rate_is_kept(capsys):
    write(Path("rows.jsonl"), rows(8))
    with TeacherServer(judged) as server:
        began = time.monotonic()
        muster(*command(server, "cft.jsonl", "--per-minute", "600"), capsys=capsys)
        came = [at - began for at in sorted(server.times)]
    # On a busy machine any of them may come late, none may come early.
    assert all(at >= place * 0.1 for place, at in enumerate(came))
    assert len(written()) == 8


def test_a_teacher_that_never_follows_the_format_is_given_up(capsys):
    write(Path("rows.jsonl"), rows(60))
    with TeacherServer(lambda n, body: f"Nice answer, number {n}!") as server:
        status, _, err = muster(*command(server), capsys=capsys)
        assert len(server.requests) < 40
    assert status == 1
    assert "has not once ended with `Conclusion" in err
    assert err.count("Nice answer") == 2
    assert "Traceback" not in err


def test_a_teacher_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(teacher, "_AT_FIRST_S", 0.3)
    write(Path("rows.jsonl"), rows(3))
    with TeacherServer(judged) as server:
        words = command(server)
    status, _, err = muster(*words, capsys=capsys)
    assert status == 1
    assert "does not answer" in err
    assert "refused" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--column", "nothing"], "no answer: looked for nothing"),
        (["--known", "nothing"], "no known answer: looked for nothing"),
        (["--sample", "model"], "--column (of the data) or --sample"),
        (["--key-env", "NOT_SET_AT_ALL"], "NOT_SET_AT_ALL is not set"),
        (["--max-cost", "1"], "needs --price-in"),
        (["--data", "nowhere.jsonl"], "no such file"),
    ],
)
def test_refusals(words, told, capsys):
    write(Path("rows.jsonl"), rows(3))
    with TeacherServer(judged) as server:
        status, _, err = muster(*command(server, "cft.jsonl", *words), capsys=capsys)
        assert (status, told in err) == (2, True), err
        assert not server.requests


@pytest.mark.cpu
def test_models_of_ones_own(tiny, capsys):
    """Both as the one who answers and as the teacher; nothing is asked twice."""
    write(Path("rows.jsonl"), [{"question": f"Q: {n} + 1 = ", "answer": str(n + 1)} for n in range(5)])
    words = [
        "critique", "cft.jsonl", "--data", "rows.jsonl", "--sample", tiny / "model", "--samples", "2",
        "--max-new-tokens", "8",
        "--teacher", tiny / "model",
    ]  # fmt: skip
    status, out, err = muster(*words, capsys=capsys)
    assert status == 0, err
    answers = [json.loads(line) for line in Path("cft.jsonl.work/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 10
    assert "left out" in out
    before = {path: path.stat().st_size for path in Path("cft.jsonl.work").glob("*.jsonl")}
    assert muster(*words, capsys=capsys)[0] == 0
    assert before == {path: path.stat().st_size for path in Path("cft.jsonl.work").glob("*.jsonl")}


@pytest.mark.parametrize("learnt", [True, False])
def test_a_model_that_has_learnt_critiques_is_asked_as_it_has_learnt(learnt):
    asked = []

    def answer(requests):
        asked.extend(requests)
        said = {"response": "Critique: yes.\nConclusion: right [END]", "ended": True, "tokens": 9}
        return [{"number": number, **said} for number in range(len(requests))]

    task = critique.Task("What is 1 + 1?", "2", "model_a", "2")
    journal = critique.Journal(Path("work/critiques.jsonl"))
    critique.ask_model([task], "teacher", journal, answer, print, learnt=learnt)
    request = critique.messages_for(task)[-1]["content"]
    assert asked[0].text == (request if learnt else f"{critique.SYSTEM}\n\n{request}")


def test_the_key_of_a_task_is_what_is_asked():
    one, two = critique.Task("q", "a", "x", None), critique.Task("q", "a", "y", "1")
    assert one.key == two.key != critique.Task("q", "b", "x", None).key
    assert critique.distinct([one, two]) == ([one], 1)
    assert os.environ["TEACHER_KEY"] == KEY
