"""A run that is interrupted, killed or restarted is the run that was left alone."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY, metrics_of, wait_for_step

from config import GPTConfig, InputError, TrainingConfig
from storygpt.checkpoint import load_checkpoint, save_checkpoint
from storygpt.files import BEST, FINAL
from storygpt.run_folder import goes_on

# Long enough to be interrupted anywhere, with evaluations and saves all along.
LONG = [*TINY, "--max_steps", "120", "--eval_interval", "40", "--save_minutes", "0"]


def flags_of(data_dir, folder, base=LONG) -> list:
    return [*base, "--data_dir", data_dir, "--checkpoint_dir", folder]


def without_speed(folder) -> list[dict]:
    """The metrics but for the speed, which no two runs share."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics_of(folder)
    ]


def flat(value, path="") -> dict:
    """{path: leaf} of a nested state."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{path}/{key}").items()}
    return {path: value}


def assert_same_run(folder, reference) -> None:
    """Weights, optimizer, schedule and metrics, bit for bit."""
    for name in ("latest", "final", "best"):
        ours, theirs = (
            flat(load_checkpoint(f / f"StoryGPT_{name}.pt")) for f in (folder, reference)
        )
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            same = torch.equal(ours[key], value) if torch.is_tensor(value) else ours[key] == value
            assert same, f"{name}{key}"
    assert without_speed(folder) == without_speed(reference)
    assert (folder / "loss_plot.png").read_bytes() == (reference / "loss_plot.png").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(script, data_dir, tmp_path_factory):
    """The folder of a whole run with those flags."""

    @cache
    def run(*flags):
        folder = tmp_path_factory.mktemp("undisturbed")
        result = script("train.py", *flags_of(data_dir, folder), *flags)
        assert result.code == 0, result.output
        return folder

    return run


@pytest.mark.parametrize(
    ("changes", "stops"),
    [((), (5, 39, 41, 77, 95)), (("--optimizer", "muon", "--max_steps", "50"), (9, 24))],
)
def test_interrupted_run_is_bit_identical(changes, stops, script, data_dir, undisturbed, tmp_path):
    flags = [*flags_of(data_dir, tmp_path), *changes]
    last = 0
    for number, step in enumerate(stops):
        resume = ["--resume"] if number else []
        process = script.start("train.py", *flags, *resume)
        wait_for_step(process, tmp_path, max(step, last + 1))  # one that this process has made
        how = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP][number % 3]
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == 128 + how
        output = process.output.read_text()
        command = f"train.py --resume --data_dir {data_dir} --checkpoint_dir {tmp_path}"
        assert command in output and "Traceback" not in output
        last = load_checkpoint(tmp_path / "StoryGPT_latest.pt")["step"]
        assert step <= last == without_speed(tmp_path)[-1]["step"] < 120
    # As printed: the other flags come from the checkpoint.
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", tmp_path)
    assert result.code == 0, result.output
    assert_same_run(tmp_path, undisturbed(*changes))


def test_a_second_signal_leaves_at_once(script, data_dir, tmp_path):
    flags = [*flags_of(data_dir, tmp_path), "--batch_size", "2000"]  # steps of several seconds
    process = script.start("train.py", *flags)
    wait_for_step(process, tmp_path, 0)
    while "0%" not in process.output.read_text():
        time.sleep(0.01)
    time.sleep(0.2)
    while process.is_alive():  # two that come within one operation count as one
        os.kill(process.pid, signal.SIGINT)
        process.join(0.1)
    assert process.exitcode == -signal.SIGINT
    assert load_checkpoint(tmp_path / "StoryGPT_latest.pt")["step"] == 0


def half_written(folder) -> set[Path]:
    return {*folder.glob(".*.tmp")}


def is_stopped(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    try:
        return {path.read_text().rpartition(")")[2].split()[0] for path in threads} <= {"T"}
    except OSError:  # one has just ended
        return False


def stop_in_a_save(process, folder, left: set[Path]) -> None:
    """Stops a run's process while a file that it saves, and is not `left` of another, is half
    written."""
    while True:
        while not half_written(folder) - left:
            assert process.is_alive(), process.output.read_text()
        os.kill(process.pid, signal.SIGSTOP)
        while not is_stopped(process.pid):
            assert process.is_alive(), process.output.read_text()
            time.sleep(0.001)
        if half_written(folder) - left:
            return
        os.kill(process.pid, signal.SIGCONT)


def test_killed_20_times_and_still_bit_identical(
    script, data_dir, undisturbed, tmp_path, record_property
):
    """SIGKILL at seeded random moments, every third time in the middle of a save."""
    rng = random.Random(0)
    saves = 0
    for kills in range(20):
        left = half_written(tmp_path)
        resume = ["--resume"] if (tmp_path / "StoryGPT_latest.pt").exists() else []
        process = script.start("train.py", *flags_of(data_dir, tmp_path), *resume)
        first = load_checkpoint(tmp_path / "StoryGPT_latest.pt")["step"] if resume else 0
        if kills == 0:
            time.sleep(rng.uniform(0, 0.5))  # perhaps before anything is there
        else:  # some way into the steps that this life adds, and far from the last
            wait_for_step(process, tmp_path, first + rng.randint(1, 3))
        if kills % 3 == 2:
            stop_in_a_save(process, tmp_path, left)
        else:
            time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.output.read_text()
        if kills % 3 == 2:
            saves += bool(half_written(tmp_path) - left)
        if (tmp_path / "StoryGPT_latest.pt").exists():  # readable, and at most 3 steps are lost
            kept = load_checkpoint(tmp_path / "StoryGPT_latest.pt")["step"]
            reached = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
            assert reached - 4 <= kept
    result = script("train.py", *flags_of(data_dir, tmp_path), "--resume")
    assert result.code == 0, result.output
    assert_same_run(tmp_path, undisturbed())
    assert saves == 6 and not half_written(tmp_path)
    record_property("SIGKILLs", f"20, {saves} of them in the middle of a save")


@pytest.mark.parametrize("lost", [(), ("StoryGPT_final.pt",)])  # killed before that was written
def test_resuming_a_finished_run_changes_nothing(lost, script, data_dir, run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    for name in lost:
        (run / name).unlink()
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", run)
    assert result.code == 0, result.output
    assert_same_run(run, run_dir)


def test_a_finished_run_needs_its_data_no_more(script, fails, run_dir, copy_of_run):
    flags = ["--resume", "--data_dir", "nowhere", "--checkpoint_dir", copy_of_run]
    result = script("train.py", *flags)
    assert result.code == 0 and "no step was left" in result.output, result.output
    best = load_checkpoint(run_dir / BEST)["val_loss"]
    assert f"best val_loss {best:.4f} in {copy_of_run / BEST}" in result.output
    for path in run_dir.iterdir():
        assert path.read_bytes() == (copy_of_run / path.name).read_bytes()
    fails("train.py", *flags, "--seed", 7, says="seed was 1337 and is now 7")
    for name in (BEST, FINAL):  # there is something to do
        (copy_of_run / name).rename(copy_of_run / "aside")
        fails("train.py", *flags, says="no prepared data in nowhere")
        (copy_of_run / "aside").rename(copy_of_run / name)


def test_a_best_that_is_gone_is_not_said_to_be_there(script, flags, tmp_path):
    """As where StoryGPT_latest.pt alone was copied to another machine."""
    run = tmp_path / "run"
    assert script("train.py", *flags, "--max_hours", "1e-9").code == 75
    latest = load_checkpoint(run / "StoryGPT_latest.pt")
    save_checkpoint(run / "StoryGPT_latest.pt", latest | {"best_val_loss": 0.5})
    result = script("train.py", *flags, "--resume")
    assert result.code == 0 and f"{run / BEST} is gone" in result.output, result.output
    best = load_checkpoint(run / BEST)["val_loss"]
    assert best == min(line.get("val_loss", 99) for line in metrics_of(run))
    assert f"best val_loss {best:.4f}" in result.output
    (run / BEST).unlink()
    result = script("train.py", *flags, "--resume")  # the last step's is as good
    assert load_checkpoint(run / BEST)["step"] == 20 and "no step was left" in result.output


def test_another_recipe_or_data_is_refused(fails, script, data_dir, run_dir, tmp_path):
    flags = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", run_dir]
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    says = "learning_rate was 0.003 and is now 0.001; seed was 1337 and is now 7"
    fails("train.py", *flags, "--seed", 7, "--learning_rate", 0.001, says=says)
    fails("train.py", *flags, "--n_layer", 3, says="n_layer was 2 and is now 3")
    fails("train.py", *flags, "--preset", "demo", says="vocab_size was 512 and is now 4096")
    other = tmp_path / "other"
    made = script("prepare_data.py", "--dataset", "sample", "--max_stories", 400, "--seed", 1,
                  "--vocab_size", 512, "--num_proc", 1, "--data_dir", other)  # fmt: skip
    assert made.code == 0
    flags[2] = other
    fails("train.py", *flags, says="is not what the run was trained on")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_other_weights_under_the_name_that_a_run_began_with_are_named():
    resumed = {"gpt_config": GPTConfig(), "training_config": TrainingConfig(), "step": 7}
    resumed["init_from"] = {"checkpoint": "a.pt", "sha256": "b"}
    origin = {"checkpoint": "a.pt", "sha256": "c"}
    with pytest.raises(InputError, match=r"init_from was a\.pt and is now changed"):
        goes_on(resumed, GPTConfig(), TrainingConfig(), origin)


# They change where a run computes and what it keeps, not what comes out of it.
MAY_CHANGE = {"device": "cuda", "compile": True, "save_minutes": 1.0, "keep_interval": 5}


def test_every_setting_that_changes_the_result_is_refused():
    gpt, training = GPTConfig(), TrainingConfig().filled_in(512)
    resumed = {"gpt_config": gpt, "training_config": training, "step": 7}
    changed = {
        "optimizer": "muon",
        "dtype": "float16",
        "bias": False,
        "vocab_size": 512,
        "n_head": 4,
    }
    for config in (gpt, training):
        for name, value in vars(config).items():
            other = MAY_CHANGE.get(name, changed.get(name))
            if other is None:  # a number
                other = value / 2 if isinstance(value, float) and value else value * 2 or 1
            both = [replace(c, **{name: other}) if c is config else c for c in (gpt, training)]
            if name in MAY_CHANGE:
                assert goes_on(resumed, *both, None)
            else:
                with pytest.raises(InputError, match=f"{name} was {value} and is now {other}"):
                    goes_on(resumed, *both, None)
                begun = resumed | {"step": 0}
                assert not goes_on(begun, *both, None)  # it has nothing to lose
                with pytest.raises(InputError, match=name):  # but what it was given
                    goes_on(begun | {"init_from": {"checkpoint": "a", "sha256": "b"}}, *both, None)


def test_foreign_optimizer_state_is_refused(fails, data_dir, run_dir, tmp_path):
    latest = load_checkpoint(run_dir / "StoryGPT_latest.pt")
    flags = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", tmp_path]
    (state,) = latest["optimizer_state_dicts"]
    for changed in (
        {k: v for k, v in latest.items() if k != "optimizer_state_dicts"},
        latest | {"optimizer_state_dicts": []},
        latest | {"optimizer_state_dicts": [{"state": {}, "param_groups": []}]},
        latest | {"optimizer_state_dicts": [state | {"state": {
            k: v | {"exp_avg": torch.zeros(3)} for k, v in state["state"].items()
        }}]},
        latest | {"scaler_state_dict": None, "scheduler_state_dicts": 3},
    ):  # fmt: skip
        save_checkpoint(tmp_path / "StoryGPT_latest.pt", changed)
        fails("train.py", *flags, says="cannot be resumed")


def test_float16_counts_its_skipped_steps_and_the_schedule_waits(script, data_dir, tmp_path):
    """Weights so large that the first steps overflow, until the scale has come down."""
    flags = [*TINY, "--dtype", "float16", "--init_std", "0.99"]
    flags += ["--n_embd", "128", "--max_steps", "12"]
    flags += ["--data_dir", data_dir, "--checkpoint_dir", tmp_path]
    assert script("train.py", *flags, "--max_hours", "1e-9").code == 75  # resumed after one step
    result = script("train.py", *flags, "--resume")
    assert result.code == 0, result.output
    lines, counted = without_speed(tmp_path), 0
    for line, after in pairwise(lines):
        counted += line["grad_norm"] is None
        assert line["skipped_steps"] == counted
        assert (after["learning_rate"] == line["learning_rate"]) == (line["grad_norm"] is None)
    assert lines[0]["grad_norm"] is None and 0 < counted < 8
    counted += lines[-1]["grad_norm"] is None
    assert load_checkpoint(tmp_path / "StoryGPT_latest.pt")["skipped_steps"] == counted
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own with 4 MiB of room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no permission to mount a small file system (RLIMIT_FSIZE is tested anyway)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(fails, script, data_dir, small_disk):
    process = script.start("train.py", *flags_of(data_dir, small_disk), "--max_steps", 60)
    wait_for_step(process, small_disk, 20)
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    process.join(60)
    output = process.output.read_text()
    assert process.exitcode == 1 and "Traceback" not in output
    said = r"^error: .* cannot be written \(No space left on device\).*: free some space"
    assert re.search(said, output, re.M), output
    kept = load_checkpoint(small_disk / "StoryGPT_latest.pt")["step"]
    assert kept >= 15
    assert not list(small_disk.glob(".*.tmp"))
    (small_disk / "filler").unlink()
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", small_disk)
    assert result.code == 0, result.output
    assert [line["step"] for line in without_speed(small_disk)] == list(range(1, 61))


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    script, data_dir, undisturbed, small_disk, tmp_path
):
    process = script.start("train.py", *flags_of(data_dir, small_disk), "--save_minutes", 1)
    wait_for_step(process, small_disk, 20)
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    while "cannot be written (No space left on device)" not in process.output.read_text():
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.01)
    (small_disk / "filler").unlink()
    process.join(60)
    assert process.exitcode == 0, process.output.read_text()
    assert without_speed(small_disk) == without_speed(undisturbed())
    for name in (BEST, FINAL):
        ours, theirs = (load_checkpoint(f / name) for f in (small_disk, undisturbed()))
        assert ours["step"] == theirs["step"]


def test_a_folder_that_cannot_be_written_is_named_before_any_step(fails, data_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = flags_of(data_dir, tmp_path / "file")
    fails("train.py", *flags, says=f"{tmp_path / 'file'} cannot be written (File exists)")
    flags = flags_of(data_dir, "/proc/checkpoints")
    fails("train.py", *flags, says="/proc/checkpoints cannot be written")
