import os
import resource
import signal
import time
from threading import Event, Timer
from types import SimpleNamespace

import pytest
import torch
from conftest import entries, losses_of, metrics_of, new_checkpoint, wait_for_step
from filelock import FileLock, Timeout

import train
from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt import token_files
from storygpt.checkpoint import load_checkpoint, save_checkpoint
from storygpt.files import BEST, FINAL, LATEST, METRICS
from storygpt.run_folder import RunFolder

# --- What is there, and who may write there ---


def test_metrics_without_checkpoints_count_as_a_run(fails, flags, copy_of_run):
    for path in copy_of_run.glob("*.pt"):
        path.unlink()
    before = {path: path.read_bytes() for path in copy_of_run.iterdir()}
    for more in ([], ["--resume"]):
        says = "already holds metrics.jsonl of a run, but not the StoryGPT_latest.pt"
        fails("train.py", *flags, *more, says=says)
    assert {path: path.read_bytes() for path in copy_of_run.iterdir()} == before


@pytest.mark.parametrize("name", [BEST, FINAL, "StoryGPT_step_000005.pt"])
def test_weights_alone_are_not_overwritten(name, tmp_path):
    (tmp_path / name).write_bytes(b"weights")
    for resume in (False, True):
        with pytest.raises(InputError, match=f"already holds {name} of a run"):
            RunFolder(tmp_path).find(resume)


@pytest.mark.parametrize(
    ("step", "what"), [(None, ""), (0, ""), (7, "a run: continue"), (9, "a finished run: pass")]
)
def test_a_folder_has_nothing_to_lose_or_is_not_overwritten(step, what, tmp_path):
    training = TrainingConfig(max_steps=9)
    if step is not None:
        resume = {"data": "", "dtype": "float32"}
        latest = new_checkpoint(step=step, training_config=training) | resume
        save_checkpoint(tmp_path / LATEST, latest)
    found = RunFolder(tmp_path).find(resume=True)
    assert (found and found["step"]) == step
    if step:
        with pytest.raises(InputError, match=f"already holds {what}"):
            RunFolder(tmp_path).find(resume=False)
    else:
        assert RunFolder(tmp_path).find(resume=False) is None


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_that_begins_while_another_sets_up_finds_the_folder_locked(
    resume, set_up, script, flags, monkeypatch
):
    """The race made wide: a whole run where another has looked and not begun to write."""
    other = []

    def load_meta(*arguments):
        other.append(script("train.py", *flags, *resume))
        return token_files.load_meta(*arguments)

    monkeypatch.setattr(train, "load_meta", load_meta)
    set_up(*resume)
    assert other[0].code == 1 and "another process is training" in other[0].output


def test_a_folder_is_locked_before_it_is_looked_at(set_up, copy_of_run, monkeypatch):
    """A restart that overlaps a stop must not go on from what the other is about to save over."""

    def load(path):
        with pytest.raises(Timeout):
            FileLock(copy_of_run / ".lock").acquire(blocking=False)
        return load_checkpoint(path)

    monkeypatch.setattr("storygpt.run_folder.load_checkpoint", load)
    _, state = set_up("--resume")
    assert state.step == 20


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--n_layer", 0], "n_layer must be"),
        (["--data_dir", "nowhere"], "no prepared data in nowhere"),
        (["--device", "tpu"], "is no device"),
    ],
)
def test_a_mistake_leaves_no_folder(changes, says, fails, flags, tmp_path):
    for resume in ([], ["--resume"]):
        fails("train.py", *flags, "--checkpoint_dir", tmp_path / "a" / "b", *changes, *resume,
              says=says)  # fmt: skip
        assert not (tmp_path / "a").exists()


def test_a_run_killed_before_its_first_save_begins_again_with_its_settings(
    script, flags, data_dir, run_dir, tmp_path
):
    """A bare --resume took the defaults: a model of 57M in the place of this one."""
    process = script.start("train.py", *flags, "--save_minutes", 10, "--eval_interval", 20)
    wait_for_step(process, tmp_path / "run", 2)
    process.kill()
    process.join()
    assert load_checkpoint(tmp_path / "run" / LATEST)["step"] == 0
    bare = ["--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run", "--save_minutes", 0]
    result = script("train.py", "--resume", *bare)
    assert result.code == 0 and "beginning again with the settings" in result.output
    assert losses_of(tmp_path / "run") == losses_of(run_dir)


def test_a_checkpoint_that_cannot_be_resumed_is_named_with_what_mends_it(fails, flags, copy_of_run):
    for data, says in (
        (b"", "is damaged"),
        ((copy_of_run / "StoryGPT_best.pt").read_bytes(), "holds weights alone"),
    ):
        (copy_of_run / "StoryGPT_latest.pt").write_bytes(data)
        for more in ([], ["--resume"]):
            said = fails("train.py", *flags, *more, says="or pass another --checkpoint_dir")
            assert says in said


# --- Locks and leftovers ---


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
    RunFolder(tmp_path).lock()
    assert "disk without locks" in capsys.readouterr().err


# --- Saving while training goes on ---


@pytest.fixture
def saving(tmp_path):
    """A run's folder whose writer is held up until `saving.go()`, and a checkpoint for it."""
    folder, hold = RunFolder(tmp_path), Event()
    folder.lock()
    folder.cut(0)
    folder.writer.submit(hold.wait, 60)
    weights = GPT(GPTConfig(vocab_size=300, context_length=8, n_layer=1, n_head=1, n_embd=8))
    checkpoint = {"gpt_config": weights.config, "training_config": TrainingConfig(), "step": 1}
    checkpoint |= {"val_loss": 1.0, "model_state_dict": weights.state_dict()}
    yield SimpleNamespace(folder=folder, checkpoint=checkpoint, go=hold.set)
    hold.set()
    folder.close()


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


def keep_up(folder) -> None:
    """What training does after each step, until the attempt to save that goes on is noticed."""
    while folder.attempt:
        folder.keep_up()
        time.sleep(0.001)


def test_a_save_that_failed_is_noticed_and_tried_again(saving, tmp_path, capsys):
    (tmp_path / BEST).mkdir()  # in the way
    saving.go()
    saving.folder.save([BEST, LATEST], saving.checkpoint, {})
    keep_up(saving.folder)
    said = capsys.readouterr().err
    assert f"{BEST} cannot be written (Is a directory)" in said
    assert "Trying again at the next step" in said
    saving.folder.keep_up()  # the next step
    keep_up(saving.folder)
    assert "Trying again in a minute" in capsys.readouterr().err
    saving.folder.keep_up()
    assert not saving.folder.attempt  # the minute is not over
    (tmp_path / BEST).rmdir()
    saving.folder.saving.next = time.monotonic()  # now it is
    saving.folder.keep_up()
    keep_up(saving.folder)
    assert load_checkpoint(tmp_path / BEST)["step"] == load_checkpoint(tmp_path / LATEST)["step"]
    assert not saving.folder.unsaved and not capsys.readouterr().err


def test_a_best_that_failed_is_saved_though_the_weights_have_moved_on(saving, tmp_path):
    """And before what tells that it is the best: StoryGPT_latest.pt."""
    (tmp_path / BEST).mkdir()
    saving.go()
    saving.folder.save([BEST, LATEST], saving.checkpoint, {})
    saving.folder.save([LATEST], saving.checkpoint | {"step": 2}, {})
    keep_up(saving.folder)
    assert not (tmp_path / LATEST).exists()
    (tmp_path / BEST).rmdir()
    saving.folder.wait()
    assert load_checkpoint(tmp_path / BEST)["step"] == 1
    assert load_checkpoint(tmp_path / LATEST)["step"] == 2


def test_a_run_ends_where_no_checkpoint_could_be_written_for_long(saving, tmp_path):
    (tmp_path / LATEST).mkdir()
    saving.go()
    saving.folder.save([LATEST], saving.checkpoint, {})
    keep_up(saving.folder)
    assert not saving.folder.failing_for(10)
    saving.folder.saving.since -= 601
    assert saving.folder.failing_for(10)
    with pytest.raises(InputError, match=f"{LATEST} cannot be written"):
        saving.folder.wait()
    (tmp_path / LATEST).rmdir()
    saving.folder.wait()  # the last try comes in time
    assert not saving.folder.failing_for(10)


def test_metrics_that_could_not_be_written_are_written_later(saving, tmp_path, capsys):
    """A disk with no room but for half a line, by the limit on a file's size."""
    lines, folder = entries(5), saving.folder
    folder.append(lines[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        room = (tmp_path / METRICS).stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        for line in lines[1:4]:
            folder.append(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = capsys.readouterr().err
    assert said.count("cannot be written (File too large): allow larger files") == 2
    assert (tmp_path / METRICS).stat().st_size == room
    folder.append(lines[4])
    assert len(folder.unwritten) == 4  # not before the minute is over
    folder.wait()
    assert metrics_of(tmp_path) == lines


def test_a_folder_is_not_unlocked_before_its_last_save_is_done(saving, tmp_path):
    """Whatever ended the run, perhaps an error: who waits for the lock must see that save."""
    saving.folder.save([LATEST], saving.checkpoint, {})
    Timer(0.2, saving.go).start()
    saving.folder.close()
    assert (tmp_path / LATEST).exists()


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


def test_tied_weights_are_saved_once_under_both_names(run_dir):
    """wte.weight and lm_head.weight: a third of the default model's file would be there twice."""
    for name, each in ((BEST, 1), (LATEST, 3)):  # weights, and AdamW's two averages of each
        checkpoint = load_checkpoint(run_dir / name)
        weights = checkpoint["model_state_dict"]
        tied = weights["wte.weight"], weights["lm_head.weight"]
        assert tied[0].data_ptr() == tied[1].data_ptr() and torch.equal(*tied)
        numbers = sum(t.numel() for t in weights.values()) - tied[0].numel()
        size = (run_dir / name).stat().st_size
        assert 4 * each * numbers < size < 4 * each * numbers + tied[0].nbytes


@pytest.mark.parametrize("name", [FINAL, "StoryGPT_step_000010.pt"])
def test_a_run_killed_in_its_first_save_goes_on_but_is_not_overwritten(
    name, script, fails, flags, run_dir, tmp_path
):
    """Its weights are there, and StoryGPT_latest.pt still is that of its beginning."""
    assert script("train.py", *flags, "--max_hours", "1e-9").code == 75
    folder = tmp_path / "run"
    latest = load_checkpoint(folder / LATEST)
    save_checkpoint(folder / LATEST, latest | {"step": 0})
    (folder / name).write_bytes(b"weights")
    fails("train.py", *flags, says="already holds a run: continue it with --resume")
    fails("train.py", *flags, "--resume", "--beta1", "0.8", says="already holds a run")
    result = script("train.py", *flags, "--resume")
    assert result.code == 0 and "beginning again" in result.output, result.output
    assert load_checkpoint(folder / FINAL)["step"] == 20


def test_a_refused_second_start_leaves_the_folder_that_the_first_has_made(tmp_path):
    first, second = RunFolder(tmp_path / "new" / "run"), RunFolder(tmp_path / "new" / "run")
    first.lock()
    with pytest.raises(InputError, match="another process is training"):
        second.lock()
    second.close()
    assert (tmp_path / "new" / "run" / ".lock").exists()
    first.close()
    assert not (tmp_path / "new").exists()
    first.lock()
    (tmp_path / "new" / "run" / ".lock").unlink()  # as Windows does when it unlocks
    first.close()
    assert not (tmp_path / "new").exists()
