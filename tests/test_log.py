import math
import os
import re
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, entries, metrics_of, python

import train
from config import InputError
from storygpt.checkpoint import load_checkpoint
from storygpt.cli import progress_bar
from storygpt.log import Log, start_tracker, words_when_done
from storygpt.tokenizer import load_tokenizer


def test_what_decorates_ends_no_run(flags, tmp_path):
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_that_is_not_there",
        "PYTHONIOENCODING": "ascii:strict",
    }
    result = python("train.py", *flags, env=environment)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert len(metrics_of(tmp_path / "run")) == 20
    best = ("--checkpoint", tmp_path / "run" / "StoryGPT_best.pt", "--max_new_tokens", 5)
    told = python("generate.py", *best, "--prompt", "日本 é", env=environment)
    assert told.returncode == 0 and "Traceback" not in told.stderr, told.stderr


def test_weights_are_kept_and_stories_told_over_training(script, flags, tmp_path):
    result = script("train.py", *flags, "--keep_interval", "5")
    assert result.code == 0, result.output
    kept = sorted(path.name for path in (tmp_path / "run").glob("StoryGPT_step_*.pt"))
    assert kept == [f"StoryGPT_step_{n:06}.pt" for n in (5, 10, 15, 20)]
    losses = {line["step"]: line.get("val_loss", math.inf) for line in metrics_of(tmp_path / "run")}
    for name in kept:  # no step has the loss of an earlier one
        checkpoint = load_checkpoint(tmp_path / "run" / name)
        assert name == f"StoryGPT_step_{checkpoint['step']:06}.pt"
        assert checkpoint["val_loss"] == losses[checkpoint["step"]]
    samples = [line["sample"] for line in metrics_of(tmp_path / "run") if line.get("sample")]
    assert len(samples) == 2
    assert all(len(load_tokenizer(512).encode_ordinary(sample)) <= 65 for sample in samples)
    assert re.search(r"tokens/s with saves and evaluations, [\d.]+ GB", result.output)


def test_after_twenty_steps_it_says_how_long(script, flags):
    result = script("train.py", *flags, "--max_steps", "30")
    assert re.search(r"about \d+:\d\d:\d\d to go at [\d,]+ tokens/s, [\d.]+ GB", result.output)


def test_a_tracker_gets_every_step_and_goes_on_when_resumed(script, flags, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    folder = str(tmp_path / "trackio")
    flags = [*flags, "--tracker", "trackio"]
    result = script("train.py", *flags, TRACKIO_DIR=folder, HF_HUB_OFFLINE="1")
    assert result.code == 0, result.output
    assert list((tmp_path / "trackio").rglob("*.db"))


@pytest.fixture
def without_wandb():
    """A test that brings its own, which no other test is to find."""
    if find_spec("wandb"):
        pytest.skip("wandb is installed, which is to be missing")
    yield
    sys.modules.pop("wandb", None)


def test_a_tracker_that_is_not_there_or_fails(
    without_wandb, fails, flags, tmp_path, monkeypatch, capsys
):
    fails("train.py", *flags, "--tracker", "wandb", says="pip install wandb")
    (tmp_path / "wandb.py").write_text(  # one that breaks in mid-run
        "class Run:\n"
        "    def define_metric(self, name, step_metric): pass\n"
        "    def log(self, entry): raise ConnectionError('gone')\n"
        "def init(name, **settings):\n"
        "    if 'offline' in name: raise ConnectionError('no network')\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="--tracker wandb cannot start: no network"):
        start_tracker("wandb", {}, "id", tmp_path / "offline")
    track = start_tracker("wandb", {}, "id", tmp_path)
    track({"step": 1})
    track({"step": 2})
    assert capsys.readouterr().err.count("wandb has failed and is off: gone") == 1


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"wandb/run-1/files": ""}, "needs the package wandb: pip install wandb"),
        ({"wandb/__init__.py": "import a_part_of_it"}, "No module named 'a_part_of_it'"),
        ({"wandb/__init__.py": "import sys; sys.nothing"}, "has no attribute 'nothing'"),
    ],
)
def test_a_tracker_that_is_not_whole_is_named(files, says, without_wandb, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=says) as raised:
        start_tracker("wandb", {}, "id", tmp_path)
    assert ("--force-reinstall" in str(raised.value)) == ("__init__" in next(iter(files)))


def test_the_last_words_tell_the_speed_of_this_sitting(tmp_path, capsys):
    """Of a run resumed at step 10: what was done before counts neither as tokens nor as time."""
    before = entries(10)
    log = Log(before, 10, 90, tmp_path, lambda entry: None, 1.0, torch.device("cpu"), torch.float32)
    with log:
        for entry in entries(20, first=11):
            log.add(entry)
        log.show_left(120)
        log.start = time.monotonic() - 10
        said = words_when_done(tmp_path, best_val_loss=2.0, speed=log.speed())
    assert "2,000 tokens/s with saves and evaluations" in said
    assert "best val_loss 2.0000" in said
    assert (tmp_path / "loss_plot.png").exists()
    assert log.bar.n == 30 and "about 0:02:00 to go at 500 tokens/s" in capsys.readouterr().out


def test_what_only_shows_a_run_ends_none(capsys):
    def track(entry: dict) -> None:
        raise ConnectionError("gone\nfor good") if entry["step"] > 1 else TimeoutError

    nowhere = Path("no") / "folder"  # for the plot
    log = Log([], 0, 30, nowhere, track, 1.0, torch.device("cpu"), torch.float32)
    with log:
        for entry in entries(5):
            log.add(entry)
    said = capsys.readouterr().err
    assert said.count("could not show the run: gone for good\n") == 4
    assert "could not show the run: TimeoutError" in said and "loss_plot.png cannot be" in said
    assert "see that its folder and its disk are still there" in said  # of the plot's


def test_a_tracker_sees_no_half_of_the_library_that_draws(tmp_path):
    """trackio looks into it for figures: it left out the numbers of whichever step was shown while
    the first plot had it loading."""
    program = """
import sys, time, torch
from pathlib import Path
from conftest import entries
from storygpt.log import Log
def track(entry):
    time.sleep(0.01)
    if "matplotlib.figure" in sys.modules:
        sys.modules["matplotlib.figure"].Figure
log = Log([], 0, 90, Path(sys.argv[1]), track, 1.0, torch.device("cpu"), torch.float32)
with log:
    for entry in entries(40):
        log.add(entry)
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    result = python("-c", program, tmp_path, env=environment)
    assert result.returncode == 0 and (tmp_path / "loss_plot.png").exists()
    assert "could not show" not in result.stderr, result.stderr


def test_a_log_file_is_not_filled_with_progress(capsys):
    bar = progress_bar(total=9)
    for _ in range(3):
        time.sleep(0.15)
        bar.update()
    assert capsys.readouterr().err.count("\r") == 1
    bar.close()


def test_a_bar_that_does_not_stay_leaves_no_empty_line_in_a_log_file(capsys):
    with progress_bar(unit=" windows", desc="scoring", leave=False) as bar:
        bar.update()
    assert not capsys.readouterr().err


def test_a_resumed_run_goes_on_in_its_tracker(set_up, monkeypatch, capsys):
    """A stand-in for wandb, which is not installed here; the second of four sittings has none."""
    begun, steps, axes = [], [], []

    def init(**settings):
        assert (Path(settings["dir"]) / ".lock").exists()  # nothing is sent of a run in use
        begun.append((settings["id"], settings["name"], settings["config"]["n_embd"]))
        return SimpleNamespace(
            define_metric=lambda name, step_metric: axes.append(step_metric),
            log=lambda e: steps.append(e["step"]),
        )

    spec = SimpleNamespace(origin="wandb.py")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=spec))
    for tracker, status in (("wandb", 75), ("none", 75), ("wandb", 75), ("wandb", 0)):
        flags = ["--resume", "--max_steps", "4", "--warmup_steps", "0", "--tracker", tracker]
        assert train.train(*set_up(*flags, "--max_hours", "1e-9")) == status
        command = re.search("continue with: (.*)", capsys.readouterr().out)
        assert ("--tracker wandb" in command[1]) == (tracker == "wandb") if status else not command
    assert steps == [1, 3, 4] and len(begun) == 3 and axes == ["step"] * 3
    assert len(set(begun)) == 1 and all(begun[0])


def test_what_a_run_will_be_is_said_as_it_begins(set_up, capsys):
    setting, state = set_up()
    few = replace(setting.batches, tokens=setting.batches.tokens[:5_000])
    train.begin(replace(setting, batches=few), state)
    said = re.search("5,000 train tokens, 512 a step, (.*) epochs", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(20 * 512 / 5_000, abs=0.1)


def test_each_of_several_gpus_has_its_share_of_the_work(set_up, monkeypatch):
    """A stand-in for the driver, and for the process beside this one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    setting, state = set_up()
    gpus = {"processes": SimpleNamespace(world_size=2), "device": torch.device("cuda")}
    log = train.begin(replace(setting, **gpus, dtype=torch.float16), state)
    with log:
        entry = {"step": 1, "tokens": 512, "train_loss": 6.0, "epoch": 0.0}
        log.add(entry | {"tokens_per_second": 1e8})
    share = state.model.flops_per_token() * 1e8 / 2 / 65e12  # a T4 has 65 TFLOP/s
    assert share > 0.1 and f"MFU={share:.1%}" in log.bar.postfix
