"""Benchmarks: peers in environments of their own, and what is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import environments, peers, sft, workload
from benchmarks.options import Options, Skipped
from benchmarks.processes import CommandFailed
from benchmarks.record import ROOT

WANTED = environments.Environment("peer", ("a==1", "b==2"), bare=("c==3",))


def curve(tokens: int, first_step_s: float, peak_gib: float, last_loss: float = 7.0) -> sft.Curve:
    return sft.Curve(
        losses=[8.0, last_loss],
        step_s=[],
        tokens=[0, tokens],
        first_step_s=first_step_s,
        rest_s=1.0,
        peak_gib=peak_gib,
    )


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[list[str]]:
    """Environments are in a folder of the test, and their commands are noted instead of run."""
    noted: list[list[str]] = []

    def note(command, **_):
        noted.append(command)
        (tmp_path / "peer").mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "VENVS", tmp_path)
    monkeypatch.setattr(environments, "run", note)
    return noted


def test_an_environment_is_built_once_and_again_when_its_pins_change(commands, tmp_path):
    python = environments.python_of(WANTED, tmp_path)
    assert python == tmp_path / "peer" / "bin" / "python"
    venv, pins, bare = commands
    assert venv[1:3] == ["-m", "venv"]
    assert pins[-2:] == ["a==1", "b==2"]
    assert bare[-2:] == ["--no-deps", "c==3"]
    environments.python_of(WANTED, tmp_path)
    assert len(commands) == 3
    environments.python_of(environments.Environment("peer", ("a==2",)), tmp_path)
    assert len(commands) == 5


def test_an_environment_that_cannot_be_built_is_a_reason_to_skip(monkeypatch, commands, tmp_path):
    def fail(*_, **__):
        raise CommandFailed("no network")

    monkeypatch.setattr(environments, "run", fail)
    with pytest.raises(Skipped, match="peer cannot be built: no network"):
        environments.python_of(WANTED, tmp_path)


def test_figures_are_ratios_of_neighbours_with_what_they_are_made_of():
    ours = [curve(300, 9.0, 3.0), curve(600, 8.0, 3.0)]
    theirs = [curve(100, 10.0, 2.0, last_loss=7.5), curve(200, 10.0, 6.0)]
    figures = peers.summary(ours, theirs, same_steps=True)
    assert figures["ratio"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    assert figures["start_ratio"]["median"] == 0.85
    assert figures["memory_ratio"] == {"median": 1.0, "min": 0.5, "max": 1.5}
    assert figures["peer_tokens_per_s"]["median"] == 150
    assert figures["loss_difference"] == 0.5


def test_losses_of_other_samples_are_not_compared():
    figures = peers.summary([curve(1, 1.0, 1.0)], [curve(1, 1.0, 1.0, last_loss=6.0)], same_steps=False)
    assert "loss_difference" not in figures
    assert (figures["muster_last_loss"], figures["peer_last_loss"]) == (7.0, 6.0)


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_has_a_script_and_whole_global_batches(name):
    peer = peers.PEERS[name]
    assert peer.environment is None or (ROOT / "benchmarks" / f"peer_{name}.py").is_file()
    assert set(peer.layouts) <= set(peers.KINDS)
    batch = sft.Training(steps=1).batch
    assert all(rows * accumulate * sft.WORKERS == batch for rows, accumulate, pack in peer.layouts.values() if not pack)


def test_a_peer_that_fails_leaves_the_others_their_figures(monkeypatch, tmp_path):
    def train(name, *_):
        if name == "openrlhf":
            raise CommandFailed("its last lines")
        return curve(100, 10.0, 2.0)

    run = sft.MusterRun(curve=curve(300, 9.0, 3.0), finished=None, events=[])
    monkeypatch.setattr(peers, "apart", lambda make, folder, *_, **__: workload.Workload(folder / "model", folder, 512))
    monkeypatch.setattr(environments, "python_of", lambda *_: Path("python"))
    monkeypatch.setattr(sft, "muster", lambda *_: run)
    monkeypatch.setattr(peers, "train", train)
    figures = peers.measure(Options(rounds=2), tmp_path)
    assert figures["openrlhf"] == {"skipped": "a run of openrlhf failed"}
    assert set(figures["trl"]) == {"peer", *peers.PEERS["trl"].layouts}
    assert figures["loop"]["gsm8k"]["ratio"]["median"] == 3.0
    assert set(peers.measure(Options(only="trl"), tmp_path)) & set(peers.PEERS) == {"trl"}
