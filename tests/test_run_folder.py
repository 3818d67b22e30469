import os
import signal
import time
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from conftest import losses_of, wait_for_step

from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt.checkpoint import load_checkpoint
from storygpt.files import BEST, FINAL, LATEST
from storygpt.run_folder import RunFolder

# --- metrics.jsonl, leftovers, two runs in one folder ---


def test_metrics_without_checkpoints_count_as_a_run(fails, flags, copy_of_run):
    for path in copy_of_run.glob("*.pt"):
        path.unlink()
    before = {path: path.read_bytes() for path in copy_of_run.iterdir()}
    fails("train.py", *flags, says="already holds a run (metrics.jsonl)")
    fails("train.py", *flags, "--resume", says="from which alone a run can be resumed")
    assert {path: path.read_bytes() for path in copy_of_run.iterdir()} == before


@pytest.mark.parametrize("name", [BEST, FINAL, "StoryGPT_step_000005.pt"])
def test_weights_alone_are_not_overwritten(name, tmp_path):
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(InputError, match=f"already holds a run .{name}."):
        RunFolder(tmp_path).check_unused()


def test_a_checkpoint_that_cannot_be_resumed_is_named_with_what_mends_it(fails, flags, copy_of_run):
    for data, says in (
        (b"", "is damaged"),
        ((copy_of_run / "StoryGPT_best.pt").read_bytes(), "holds weights alone"),
    ):
        (copy_of_run / "StoryGPT_latest.pt").write_bytes(data)
        for more in ([], ["--resume"]):
            said = fails("train.py", *flags, *more, says="or pass another --checkpoint_dir")
            assert says in said


def test_two_runs_in_one_folder(script, fails, flags, tmp_path):
    first = script.start("train.py", *flags, "--max_steps", "2000")
    while not (tmp_path / "run" / "StoryGPT_latest.pt").exists():
        assert first.is_alive(), first.output.read_text()
        time.sleep(0.01)
    fails("train.py", *flags, "--max_steps", "2000", "--resume", says="another process is training")
    os.kill(first.pid, signal.SIGKILL)  # the lock dies with its process
    first.join()
    result = script("train.py", *flags, "--max_steps", "20", "--resume")
    assert "another process" not in result.output


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    """A stand-in for such a disk: flock answers as one does."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert RunFolder(tmp_path).open(0) == []
    assert "disk without locks" in capsys.readouterr().err


# --- Saving while training goes on ---


@pytest.fixture
def saving(tmp_path):
    """A run's folder whose writer is held up until `saving.go()`, and a checkpoint for it."""
    folder, hold = RunFolder(tmp_path), Event()
    folder.open(0)
    folder.writer.submit(hold.wait, 60)
    weights = GPT(GPTConfig(vocab_size=300, context_length=8, n_layer=1, n_head=1, n_embd=8))
    checkpoint = {"gpt_config": weights.config, "training_config": TrainingConfig(), "step": 1}
    checkpoint |= {"val_loss": 1.0, "model_state_dict": weights.state_dict()}
    yield SimpleNamespace(folder=folder, checkpoint=checkpoint, go=hold.set)
    hold.set()
    folder.lock.release()


def test_a_save_is_of_the_moment_it_was_asked_for(saving, tmp_path):
    """Training writes into the same weights and averages while the writer is at work."""
    weights, average = saving.checkpoint["model_state_dict"], torch.ones(3)
    before = {name: weight.clone() for name, weight in weights.items()}
    saving.folder.save([LATEST], saving.checkpoint, {"optimizer": [{"exp_avg": average}]})
    for tensor in (*weights.values(), average):
        tensor.detach().fill_(7.0)
    saving.go()
    saving.folder.wait()
    saved = load_checkpoint(tmp_path / LATEST)
    assert torch.equal(saved["optimizer"][0]["exp_avg"], torch.ones(3))
    for name, weight in before.items():
        assert torch.equal(saved["model_state_dict"][name], weight), name


@pytest.mark.parametrize("then", ["save", "wait"])
def test_a_save_that_failed_is_told_at_the_next_and_at_the_end(then, saving, tmp_path):
    (tmp_path / BEST).mkdir()  # in the way
    saving.go()
    saving.folder.save([BEST], saving.checkpoint, {})
    with pytest.raises(InputError, match=f"{BEST} cannot be written"):
        if then == "save":
            saving.folder.save([LATEST], saving.checkpoint, {})
        else:
            saving.folder.wait()
    assert not (tmp_path / LATEST).exists()


def test_weights_that_are_not_finite_are_not_saved(saving, tmp_path):
    saving.checkpoint["model_state_dict"]["ln_f.bias"][3] = float("nan")
    with pytest.raises(InputError, match="weights that are not finite"):
        saving.folder.save([LATEST], saving.checkpoint, {})
    saving.go()
    saving.folder.wait()
    assert not (tmp_path / LATEST).exists()


def test_only_our_own_leftovers_go(script, flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()  # of one killed before it saved anything
    mine = [tmp_path / "run" / name for name in (".notes.tmp", ".StoryGPT_ideas.txt.tmp")]
    ours = tmp_path / "run" / ".StoryGPT_latest.pt.abcd_123.tmp"
    for path in (*mine, ours):
        path.write_text("x")
    assert script("train.py", *flags).code == 0
    assert all(path.exists() for path in mine) and not ours.exists()


# --- What people do every day ---


def test_resume_starts_where_there_is_nothing_and_continues_where_there_is(
    script, flags, run_dir, tmp_path
):
    for stop in (True, False):
        process = script.start("train.py", *flags, "--resume")
        if stop:
            wait_for_step(process, tmp_path / "run", 1)
            os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        said = process.output.read_text()
        assert ("starting a new run" in said) == stop and ("resuming after step" in said) != stop
        assert "this run was in" not in said
    assert losses_of(tmp_path / "run") == losses_of(run_dir)
