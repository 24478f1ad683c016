"""Saving beside the training: one save at a time, committed when all have written, tried again once when it fails."""

from __future__ import annotations

import pytest
import torch

from tests.support.training_fixtures import Recorder
from training.checkpoint.async_writer import ShardWriter
from training.checkpoint.format import OPTIMIZER, File, Manifest, verify, write_shard
from training.config import SFT
from training.drivers.saver import Saver
from training.errors import SaveError
from training.group import Done
from training.phase_info import PhaseInfo
from training.storage import open_storage

PHASE_INFO = PhaseInfo(
    total_steps=100, total_samples=800, num_samples=100, num_eval_samples=0, num_parameters=4, dtype="float32",
    attention="sdpa", device="cpu", data_hash="d", chats=False, notes=[],
)  # fmt: skip


class Workers:
    """A group whose two workers write when they are told to, or fail."""

    size = 2

    def __init__(self):
        self.writing, self.broken, self.calls = True, 0, []

    def call(self, method, *args):
        self.calls.append(method)
        return [Done(getattr(self, method)(rank, *args)) for rank in range(self.size)]

    def begin_save(self, rank, staged):
        self.staged = open_storage(staged)
        return {"optimizer_step": 1, "parameters": {"w": [4]}}

    def is_saving(self, rank):
        return self.writing and rank == 1

    def finish_save(self, rank) -> list[File]:
        if self.broken:
            self.broken -= 1
            raise SaveError("the checkpoint cannot be written: No space left on device")
        values = torch.arange(2 * rank, 2 * rank + 2, dtype=torch.float32).numpy()
        shards = {f"worker-{rank}.safetensors": "fp32", f"worker-{rank}{OPTIMIZER}": "exp_avg"}
        return [write_shard(self.staged / name, [(f"{kind}/w@{2 * rank}", 2)], values) for name, kind in shards.items()]


def saver_of(folder, **settings) -> Saver:
    draft = {"recipe": "sft", "model": {"path": "-"}, "data": {"train": "-", "eval": "-"}, "batch": 8, **settings}
    return Saver(SFT.model_validate(draft), {"trainer": Workers()}, Recorder(folder), PHASE_INFO, newest=0)


@pytest.fixture
def saver(tmp_path):
    return saver_of(tmp_path)


def committed(saver):
    return [folder.name for folder in saver.hooks.checkpoints.folders()]


def test_nothing_is_committed_before_all_have_written(saver):
    saver.save(5)
    saver.poll()
    assert committed(saver) == []
    saver.learners["trainer"].writing = False
    saver.poll()
    assert committed(saver) == ["step-00000005"]
    assert verify(saver.hooks.checkpoints.at(5)) == []


def test_an_evaluation_is_noted_beside_its_checkpoint_whichever_comes_first(saver):
    saver.save(200)
    saver.evaluated(200, {"eval_loss": 2.0})
    assert committed(saver) == []
    saver.finish()
    saver.save(400)
    saver.finish()
    saver.evaluated(400, {"eval_loss": 3.0})
    checkpoints = saver.hooks.checkpoints
    assert [Manifest.read(checkpoints.at(step)).metrics for step in (200, 400)] == [
        {"eval_loss": 2.0},
        {"eval_loss": 3.0},
    ]
    assert checkpoints.best("eval_loss") == checkpoints.at(200)
    assert verify(checkpoints.at(400)) == []


def test_an_evaluation_of_a_step_that_is_not_saved_waits_for_it(saver):
    saver.save(5)
    saver.finish()
    saver.evaluated(6, {"eval_loss": 3.0})
    assert Manifest.read(saver.hooks.checkpoints.at(5)).metrics == {}
    saver.save(6)  # the run is to stop
    saver.finish()
    assert Manifest.read(saver.hooks.checkpoints.at(6)).metrics == {"eval_loss": 3.0}


def test_an_evaluation_is_noted_though_its_save_ends_after_the_next_evaluation(saver):
    saver.save(5)
    saver.evaluated(5, {"eval_loss": 1.0})
    saver.evaluated(8, {"eval_loss": 2.0})
    saver.finish()
    assert Manifest.read(saver.hooks.checkpoints.at(5)).metrics == {"eval_loss": 1.0}
    saver.save(8)
    saver.finish()
    assert Manifest.read(saver.hooks.checkpoints.at(8)).metrics == {"eval_loss": 2.0}


def test_an_evaluation_that_was_cut_short_is_none(saver):
    saver.save(5)
    saver.finish()
    folder = saver.hooks.checkpoints.at(5)
    (folder / "metrics.json").write(b'{"eval_lo')
    assert Manifest.read(folder).metrics == {}


def test_the_next_save_waits_for_the_one_before(saver):
    saver.save(5)
    saver.save(6)
    assert saver.learners["trainer"].calls == ["begin_save", "finish_save", "begin_save"]
    assert committed(saver) == ["step-00000005"]


def test_a_step_is_saved_once(saver):
    saver.save(5)
    saver.save(5)
    saver.finish()
    assert saver.learners["trainer"].calls.count("begin_save") == 1


def test_a_failed_save_is_told_leaves_nothing_and_is_due_again(saver):
    saver.learners["trainer"].broken = 1
    saver.save(5)
    saver.finish()
    assert saver.failed
    assert committed(saver) == []
    assert saver.hooks.checkpoints.staging.children() == {}
    assert saver.hooks.events[-1][0] == "save_failed"
    saver.save(5)
    saver.finish()
    assert not saver.failed
    assert committed(saver) == ["step-00000005"]


def test_a_second_failure_in_a_row_ends_the_run(saver):
    saver.learners["trainer"].broken = 2
    saver.save(5)
    saver.finish()
    with pytest.raises(SaveError, match="No space left on device"):
        saver.save(6)
        saver.finish()


def test_a_checkpoint_is_due_when_the_last_one_is_as_old_as_the_job_says(tmp_path):
    saver = saver_of(tmp_path, checkpoint={"every": "10m"})
    saver.hooks.seconds = 599.0
    assert (saver.is_due(1), saver.due_in_s()) == (False, 1.0)
    saver.hooks.seconds = 600.0
    assert saver.is_due(2)
    saver.save(2)
    saver.hooks.seconds = 2000.0  # it takes long to write, and training does not wait for it
    assert not saver.is_due(3)
    saver.finish()
    assert not saver.is_due(3)
    saver.hooks.seconds = 2600.0
    assert saver.is_due(4)
    assert not saver.is_due(2), "it is saved already"
    assert saver.is_due(PHASE_INFO.total_steps)


def test_with_a_time_all_checkpoints_are_kept_in_turn_and_the_best_is_one_that_was_evaluated_by_the_step(tmp_path):
    best = {"metric": "eval_loss"}
    saver = saver_of(tmp_path, checkpoint={"every": "10m", "keep": 2, "best": best}, eval_every=10)
    assert [step for step in range(1, 25) if saver.is_due(step)] == [10, 20]
    for step, loss in ((10, 2.0), (13, None), (17, 1.0), (20, 3.0), (23, None)):
        saver.save(step)
        saver.finish()
        if loss is not None:
            saver.evaluated(step, {"eval_loss": loss})
    # Another run would not have a step 17: it was made by the clock, or because of an interruption.
    assert committed(saver) == ["step-00000010", "step-00000020", "step-00000023"]


def test_what_cannot_be_deleted_ends_no_run_and_goes_after_the_next_checkpoint(tmp_path):
    saver = saver_of(tmp_path, checkpoint={"keep": 1})
    in_the_way = tmp_path / ".old-step-00000200"  # the name that it would get
    in_the_way.symlink_to(tmp_path.parent)
    for step in (200, 400):
        saver.save(step)
        saver.finish()
    assert [kind for kind, _ in saver.hooks.events] == ["checkpoint", "checkpoint", "retention_failed"]
    assert committed(saver) == ["step-00000200", "step-00000400"]
    in_the_way.unlink()
    saver.save(600)
    saver.finish()
    assert committed(saver) == ["step-00000600"]


def test_what_somebody_asks_for_is_saved_now_also_in_the_middle_of_an_evaluation(saver):
    saver.hooks.save_at = {5, 6}
    assert [step for step in (4, 5) if saver.is_due(step)] == [5]
    saver.save(5)
    saver.finish()
    saver.attend(6)
    saver.finish()
    assert committed(saver)[-1] == "step-00000006"


def test_what_is_evaluated_for_long_is_saved_meanwhile_when_the_clock_says_so(tmp_path):
    saver = saver_of(tmp_path, checkpoint={"every": "90s"})
    saver.attend(7)
    saver.hooks.seconds = 90.0
    saver.attend(7)
    saver.attend(7)
    assert saver.learners["trainer"].calls.count("begin_save") == 1
    saver.finish()
    saver.hooks.seconds = 1000.0
    saver.attend(7)
    assert (committed(saver), saver.is_saving) == (["step-00000007"], False)


def test_the_state_that_is_saved_is_that_of_the_moment(tmp_path):
    from safetensors.numpy import load_file

    state = torch.zeros(1_000_000)
    writer = ShardWriter()
    writer.begin(
        open_storage(tmp_path), {"weights": [("a", state[:10]), ("b", state[10:999])], "rest": [("c", state[999:])]}
    )
    state.fill_(7)  # the training goes on while the files are written
    files = writer.finish()
    assert {file.name: file.size for file in files} == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    saved = load_file(tmp_path / "weights") | load_file(tmp_path / "rest")
    assert saved["a"].tolist() == [0.0] * 10
    assert [saved[name].size for name in ("b", "c")] == [989, 999_001]
    assert saved["b"].max() == saved["c"].max() == 0


def test_a_full_disk_is_told_when_the_save_is_finished(tmp_path):
    writer = ShardWriter()
    writer.begin(open_storage(tmp_path / "no" / "such" / "folder"), {"shard": [("a", torch.zeros(3))]})
    with pytest.raises(SaveError, match="the checkpoint cannot be written: No such file or directory"):
        writer.finish()
    assert writer.finish() == []
