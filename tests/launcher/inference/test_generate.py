"""Trying a model: in a real terminal, from a pipe, from a file over workers, and from checkpoints."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest

from training.evaluation.streaming import Streamed

pytestmark = pytest.mark.cpu
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PATIENCE_S = 60.0
INTERRUPT, END = b"\x03", b"\x04"


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


class Terminal:
    """The command in a terminal of its own."""

    left: ClassVar[set[int]] = set()
    """Processes that have not ended."""

    def __init__(self, *arguments: str):
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
            os.environ.update(PYTHONPATH=str(Path(__file__).parents[3]), TERM="dumb")
            os.execv(sys.executable, [sys.executable, "-m", "launcher", "generate", *arguments])
        self.left.add(self.pid)

    def until(self, mark: str) -> str:
        """What appears up to this text."""
        ends_at = time.monotonic() + PATIENCE_S
        while mark.encode() not in self.seen:
            assert time.monotonic() < ends_at, self.seen
            if not self._read():
                raise AssertionError(f"it ended without {mark!r}: {self.seen!r}")
        at = self.seen.index(mark.encode()) + len(mark.encode())
        shown, self.seen = self.seen[:at], self.seen[at:]
        return shown.decode().replace("\r\n", "\n")

    def type(self, keys: str | bytes) -> None:
        os.write(self.fd, keys.encode() if isinstance(keys, str) else keys)

    def ask(self, line: str) -> str:
        """Type a line and wait until the next may be typed; what came between."""
        self.type(f"{line}\n")
        self.until(f"{line}\r\n")
        return self.until("> ").removesuffix("> ")

    def end(self) -> tuple[int, str]:
        """Exit status, and the rest of what appears."""
        ends_at = time.monotonic() + PATIENCE_S
        while self._read():
            assert time.monotonic() < ends_at, self.seen
        self.left.remove(self.pid)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.seen.decode().replace("\r\n", "\n")

    def _read(self) -> bool:
        if not select.select([self.fd], [], [], 1)[0]:
            return True
        try:
            piece = os.read(self.fd, 4096)
        except OSError:  # Linux's way of saying that the other side is gone
            return False
        self.seen += piece
        return bool(piece)


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    while Terminal.left:
        pid = Terminal.left.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def chatty(place):
    """The model as one that has learnt chats."""
    edit(place / "model" / "tokenizer_config.json", chat_template=TEMPLATE)
    return place


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A folder with a finished run: checkpoints of steps 2 and 4, and a model."""
    from typer.testing import CliRunner

    from launcher.cli import main

    folder = tmp_path_factory.mktemp("trained") / "place"
    shutil.copytree(template, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert CliRunner().invoke(main.app, ["run", "job.yaml", "--inline", "--no-preflight"]).exit_code == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it, which is the current folder; the run is runs/sums."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Path("runs/sums/sft")


# -- streaming ---------------------------------------------------------------------------------------------------------


def test_text_comes_in_whole_characters_and_is_the_same_in_the_end(template):
    from training.evaluation.evaluator import PromptCodec

    texts = PromptCodec(str(template / "model"))
    said = "a é 漢字 👩‍🚀 " * 20
    tokens = texts.tokens(said)
    assert len(tokens) == len(said.encode()), "a token a byte"
    streamed = Streamed(texts.text)
    pieces = [streamed.add(token) for token in tokens]
    assert "".join(pieces) + streamed.end() == said
    assert "\ufffd" not in "".join(pieces)
    broken = [
        *tokens[:4],
        tokens[6],
        tokens[7],
        *tokens[-30:-3],
    ]  # characters without their beginnings, one without its end
    streamed = Streamed(texts.text)
    assert "".join(map(streamed.add, broken)) + streamed.end() == texts.text(broken)


def test_a_streamed_response_has_the_tokens_of_an_unstreamed_one(muster, place):
    prompts = ["1 + 1 =", "2 + 2 =", "3 + "]
    options = ("--temperature", "1", "--seed", "3", "--max-new-tokens", "24")
    write(place / "q.jsonl", [{"prompt": prompt} for prompt in prompts])
    expected = json.loads(muster("generate", "model", "--file", "q.jsonl", *options, "--json").out)
    terminal = Terminal("model", "-p", prompts[0], *options)
    status, shown = terminal.end()
    from launcher.process.terminal import printable

    assert (status, shown) == (0, f"prompt:   {prompts[0]}\nresponse: {printable(expected[0]['response'].strip())}\n")


def test_lines_of_a_pipe_are_prompts(place, muster):
    from typer.testing import CliRunner

    from launcher.cli import main
    from launcher.process.terminal import printable

    words = ["generate", "model", "--temperature", "1", "--max-new-tokens", "8"]
    lines = "1 + 1 =\n\n2 + 2 =\n"
    answer = CliRunner().invoke(main.app, words, input=lines)
    rows = json.loads(CliRunner().invoke(main.app, [*words, "--json"], input=lines).stdout)
    assert [row["prompt"] for row in rows] == ["1 + 1 =", "2 + 2 ="]
    assert answer.stdout == "".join(printable(row["response"].strip()) + "\n" for row in rows)
    long = CliRunner().invoke(main.app, words, input=f"1\n{'1 + ' * 30}\n")
    assert (long.exit_code, long.stderr) == (
        2, "stdin:2: the prompt has 120 tokens, the model has 64 positions for it and the response; shorten it\n"
    )  # fmt: skip


# -- the chat ----------------------------------------------------------------------------------------------------------


def test_a_chat_keeps_the_conversation_until_it_begins_anew(chatty, muster):
    """What is answered to the second line is what a conversation of three turns is answered."""
    options = ("--max-new-tokens", "6")
    terminal = Terminal("model", *options)
    assert "model: a chat; /help\n" in terminal.until("> ")
    first, second = terminal.ask("one"), terminal.ask("two")
    assert "/new" in terminal.ask("/help")
    assert terminal.ask("/new") == ""
    assert terminal.ask("one") == first
    terminal.type("/quit\n")
    assert terminal.end()[0] == 0
    alone = json.loads(muster("generate", "model", "-p", "one", *options, "--json").out)[0]["response"]
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": alone},
        {"role": "user", "content": "two"},
    ]
    write(chatty / "q.jsonl", [{"messages": turns}])
    both = json.loads(muster("generate", "model", "--file", "q.jsonl", *options, "--json").out)[0]["response"]
    from launcher.process.terminal import printable

    assert first.startswith(printable(alone.strip()))
    assert second.startswith(printable(both.strip()))


def test_a_chat_longer_than_the_model_forgets_its_beginning_and_says_so(chatty):
    terminal = Terminal("model", "--max-new-tokens", "8")
    terminal.until("> ")
    assert "forgotten" not in terminal.ask("1 + 1 = 2 or so")
    assert "(the model has 64 positions: the oldest 2 turns are dropped; /new starts a new chat)" in terminal.ask(
        "2 + 2 = 4 or so, I think"
    )
    refused = terminal.ask("1 + " * 15 + "x")
    assert refused.startswith("the prompt has 66 tokens, the model has 64 positions")
    assert "forgotten" not in refused
    assert "forgotten" not in terminal.ask("/new") + terminal.ask("1")
    assert terminal.ask("/nwe") == "no such command: /nwe; /help\n"
    terminal.type(END)
    assert terminal.end()[0] == 0


def test_an_interruption_ends_the_response_alone_and_then_the_chat(place):
    edit(place / "model" / "config.json", max_position_embeddings=1_000_000, eos_token_id=None)
    terminal = Terminal("model", "--max-new-tokens", "900000", "--seed", "1")
    assert "this model was not trained for chats: it continues every line as it is" in terminal.until("> ")
    terminal.type("go on\n")
    terminal.until("go on\r\n")
    while len(terminal.seen) < 20:
        assert terminal._read(), terminal.seen
    terminal.type(INTERRUPT)
    assert "(interrupted)" in terminal.until("> ")
    time.sleep(0.5)  # a signal between the prompt and readline's wait is only seen at the next key
    terminal.type(INTERRUPT)
    status, shown = terminal.end()
    assert status == 0
    assert "Traceback" not in shown


# -- a file of prompts -------------------------------------------------------------------------------------------------


def test_workers_write_what_one_writes(muster, place, ray_cluster, monkeypatch):
    monkeypatch.setattr(
        "launcher.workers.ray_session.ray_session", lambda workers: nullcontext()
    )  # there is one already
    write(place / "q.jsonl", [{"prompt": f"{n} + {'1' * (n % 5)} = ", "answer": str(n)} for n in range(9)])
    words = (
        "generate",
        "model",
        "--file",
        "q.jsonl",
        "--samples",
        "2",
        "--temperature",
        "0.8",
        "--top-p",
        "0.9",
        "--max-new-tokens",
        "12",
    )
    one = json.loads(muster(*words, "--json").out)
    assert len(one) == 18
    assert one[0]["response"] != one[1]["response"]
    assert [row["expected"] for row in one[::2]] == [str(n) for n in range(9)]
    two = muster(*words, "--workers", "2", "--batch", "3", "--json")
    assert two.status == 0, two.err
    assert json.loads(two.out) == one


def test_ray_is_imported_after_the_environment_that_its_token_is_in():
    """Else it would not be let in by the Ray of its own that it starts."""
    code = """
import sys
from launcher.inference import evaluate, generate
from launcher.workers import ray_session as session
def ray_session(workers):
    assert "ray" not in sys.modules
    raise SystemExit("as it should be")
session.ray_session = ray_session
with evaluate.asking("model", evaluate.Loading("auto", 2, False)): pass
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == "as it should be\n"


def test_responses_go_to_a_file_as_they_come_and_are_gone_on_with(muster, place, monkeypatch):
    from training.evaluation.evaluator import Evaluator

    write(place / "q.jsonl", [{"prompt": f"{n} + 1 = "} for n in range(6)])
    words = ("generate", "model", "--file", "q.jsonl", "--max-new-tokens", "4", "--batch", "2")
    out = place / "r.jsonl"
    real, calls = Evaluator.continued, []

    def cut_off(self, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, *rest)

    monkeypatch.setattr(Evaluator, "continued", cut_off)
    answer = muster(*words, "--out", "r.jsonl")
    assert (answer.status, answer.err) == (130, "r.jsonl: 4 of 6 responses; run the same command to continue\n")
    assert len(rows_of(out)) == 4
    out.write_bytes(out.read_bytes() + b'{"number": 4, "sam')
    answer = muster(*words, "--out", "r.jsonl")
    assert (answer.status, answer.out) == (0, "r.jsonl: 6 responses to 6 prompts (4 were there before)\n")
    assert calls == [2, 2, 2, 2]
    whole = json.loads(muster(*words, "--json").out)
    assert [{key: row[key] for key in whole[0]} for row in rows_of(out)] == whole
    assert rows_of(out)[0]["model"] == "model"
    before = out.read_bytes()
    other = muster(*words, "--out", "r.jsonl", "--seed", "1")
    message = "r.jsonl: has responses with a different seed; choose a different --out, or remove the file\n"
    assert (other.status, other.err) == (2, message)
    assert out.read_bytes() == before


def test_a_response_ends_where_the_positions_of_the_model_do(muster, place):
    edit(place / "model" / "config.json", eos_token_id=None)
    write(place / "q.jsonl", [{"prompt": "1" * length} for length in (60, 40, 5)])
    rows = json.loads(muster("generate", "model", "--file", "q.jsonl", "--max-new-tokens", "30", "--json").out)
    assert [row["tokens"] for row in rows] == [4, 24, 30]
    assert not any(row["ended"] for row in rows)


def test_rows_that_end_with_an_answer_are_asked_without_it(muster, chatty):
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    write(chatty / "q.jsonl", [{"messages": turns}, {"prompt": turns[:1]}])
    first, second = json.loads(muster("generate", "model", "--file", "q.jsonl", "--max-new-tokens", "4", "--json").out)
    assert first["expected"] == "2"
    assert first["prompt"] == second["prompt"] == turns[:1]
    assert first["response"] == second["response"]
    assert "prompt:   1 + 1\n" in muster("generate", "model", "--file", "q.jsonl", "--max-new-tokens", "4").out


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_by_its_step_or_its_folder_is_written_once(muster, run):
    words = ("-p", "1 + 1 =", "--max-new-tokens", "4", "--json")
    by_step = muster("generate", "sums", "--step", "2", *words)
    assert by_step.status == 0, by_step
    assert by_step.err.startswith("runs/sums/sft/checkpoints/step-00000002: written as a model to ")
    by_folder = muster("generate", str(run / "checkpoints" / "step-00000002"), *words)
    assert (by_folder.out, by_folder.err) == (by_step.out, "")
    assert (
        muster("generate", "sums/sft" if Path("sums").exists() else str(run), "--step", "2", *words).out == by_step.out
    )
    assert muster("export", "sums", "--step", "2", "--out", "exported").status == 0
    assert muster("generate", "exported", *words).out == by_step.out


def test_a_run_without_a_model_is_tried_by_its_newest_whole_checkpoint(muster, run):
    words = ("-p", "1 + 1 =", "--max-new-tokens", "4", "--json")
    finished = muster("generate", "sums", *words)
    shutil.rmtree(run / "model")
    newest = muster("generate", "sums", *words)
    line = "runs/sums: no model yet; this is its newest whole checkpoint, of step 4 of sft"
    assert newest.errors[0] == line
    assert json.loads(newest.out) == json.loads(finished.out)
    shard = next(file for file in (run / "checkpoints" / "step-00000004").rglob("*") if file.suffix == ".safetensors")
    os.truncate(shard, shard.stat().st_size - 4)
    manifest = run / "checkpoints" / "step-00000004" / "manifest.json"
    edit(manifest, created="another time")
    assert muster("generate", "sums", *words).errors[0] == line.replace("step 4", "step 2")


# -- wrong input -------------------------------------------------------------------------------------------------------

WRONG = {
    "a step that is not there": (
        ("sums", "--step", "3", "-p", "x"),
        "runs/sums/sft/checkpoints: no checkpoint of step 3; there are: 2, 4",
    ),
    "a phase that is not there": (("sums", "--phase", "ppo", "-p", "x"), "runs/sums: no phase ppo; there are: sft"),
    "a step of a model": (
        ("model", "--step", "2", "-p", "x"),
        "--step: needs a run; model is the folder of a model",
    ),
    "two steps": (
        ("runs/sums/sft/checkpoints/step-00000002", "--step", "4", "-p", "x"),
        "--step: got 4, but runs/sums/sft/checkpoints/step-00000002 says 2; omit one of them",
    ),
    "a file in no folder": (
        ("model", "-p", "x", "--out", "no/r.jsonl"),
        "no/r.jsonl: the folder no does not exist; create it, or choose a different --out",
    ),
    "a folder as file": (
        ("model", "-p", "x", "--out", "data"),
        "data: is not a file; set --out to a file, or omit it to print the responses",
    ),
    "a file that is something else": (
        ("model", "-p", "x", "--out", "data/train.jsonl"),
        "data/train.jsonl: exists and is not a file of responses; choose a different --out",
    ),
    "a long prompt": (
        ("model", "-p", "1 + " * 20),
        "--prompt: the prompt has 80 tokens, the model has 64 positions for it and the response; shorten it",
    ),
    "a chat without a template": (
        ("model", "--chat", "-p", "x"),
        "model: the tokenizer has no chat template; ask it plainly (without --chat, or with --template plain)",
    ),
    "a limit of nothing": (("model", "-p", "x", "--limit", "2"), "--limit: needs --file"),
    "equal samples": (
        ("model", "-p", "x", "--samples", "2"),
        "--temperature: several samples at temperature 0 are the same; choose one, such as 0.7",
    ),
    "a nucleus of one token": (
        ("model", "-p", "x", "--top-p", "0.5"),
        "--top-p: has no effect at temperature 0, where the most likely token is chosen; set --temperature above 0, "
        "or omit it",
    ),
    "bytes that are no text": (("model", "-p", "\udcff"), "--prompt: the prompt is not UTF-8 text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_starts_nothing(muster, run, case):
    arguments, message = WRONG[case]
    answer = muster("generate", *arguments)
    assert (answer.status, answer.out, answer.err) == (2, "", f"{message}\n")


def test_a_file_that_is_no_jsonl_is_left_as_it_is(muster, place):
    (place / "letter.txt").write_text("Dear Mia")
    answer = muster("generate", "model", "-p", "x", "--out", "letter.txt")
    assert (answer.status, answer.errors) == (
        2, ["letter.txt: exists and is not a file of responses; choose a different --out"],
    )  # fmt: skip
    assert (place / "letter.txt").read_text() == "Dear Mia"


def test_rows_that_cannot_be_asked_are_told_together(muster, place):
    turns = [{"role": "user", "content": "x"}]
    write(place / "q.jsonl", [{"messages": turns}, {"messages": []}, {"prompt": [{"role": "usr", "content": "x"}]}])
    answer = muster("generate", "model", "--file", "q.jsonl")
    assert answer.errors == [
        "q.jsonl:2: column `messages`: the last turn is not one that an assistant answers",
        "q.jsonl:3: prompt[0]: unknown role 'usr'; known are system, developer, user, assistant, tool, function, "
        "ipython, tool_call, tool_response",
    ]
    write(place / "q.jsonl", [{"messages": turns}, {"prompt": "1" * 70}])
    assert muster("generate", "model", "--file", "q.jsonl").errors == [
        "q.jsonl:1: the prompt is a list of messages, and model has no chat template; give it as text",
        "q.jsonl:2: the prompt has 70 tokens, the model has 64 positions for it and the response; shorten it",
    ]


@pytest.mark.parametrize("option", [("--workers", "2"), ("--json",), ("--out", "r.jsonl")], ids=" ".join)
def test_a_chat_takes_no_options_of_files(place, option):
    status, shown = Terminal("model", *option).end()
    message = "a chat in the terminal has one worker and one response at a time; give prompts with --prompt or --file"
    assert (status, shown) == (2, f"{option[0]}: {message}\n")
