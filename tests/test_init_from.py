import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, TINY, losses_of, metrics_of, new_checkpoint, wait_for_step

from model import GPT
from storygpt.checkpoint import fit_start, load_checkpoint, load_model, load_start, save_checkpoint
from storygpt.record import origin_of


def test_init_from_then_resume_is_the_run_left_alone(script, data_dir, run_dir, tmp_path):
    flags = [*TINY, "--data_dir", data_dir, "--init_from", "StoryGPT_best.pt"]
    flags += ["--learning_rate", "0.001", "--min_lr", "0.0001"]
    result = script("train.py", *flags, "--checkpoint_dir", tmp_path / "whole", cwd=run_dir)
    assert result.code == 0, result.output
    start = metrics_of(tmp_path / "whole")[0]
    known = load_checkpoint(run_dir / "StoryGPT_best.pt")
    assert start["step"] == 0 and start["val_loss"] == pytest.approx(known["val_loss"], rel=1e-6)
    assert start["init_from"]["checkpoint"] == str(run_dir / "StoryGPT_best.pt")
    assert (tmp_path / "whole" / "loss_plot.png").exists()

    process = script.start(
        "train.py", *flags, "--checkpoint_dir", tmp_path / "stopped", cwd=run_dir
    )
    path = tmp_path / "stopped" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    flags += ["--resume", "--checkpoint_dir", tmp_path / "stopped"]  # the same command, requeued
    result = script("train.py", *flags, cwd=run_dir)
    assert result.code == 0, result.output
    assert losses_of(tmp_path / "stopped")[1:] == losses_of(tmp_path / "whole")[1:]
    ours, theirs = (
        load_checkpoint(tmp_path / name / "StoryGPT_final.pt") for name in ("stopped", "whole")
    )
    assert origin_of(ours) == origin_of(theirs) == start["init_from"]
    for name, weight in theirs["model_state_dict"].items():
        assert torch.equal(ours["model_state_dict"][name], weight), name


def test_a_run_from_other_weights_killed_before_its_first_save_keeps_them(
    script, fails, data_dir, run_dir, tmp_path
):
    flags = [*TINY, "--data_dir", data_dir, "--init_from", run_dir / "StoryGPT_best.pt"]
    flags += ["--eval_interval", 20]
    run = ["--checkpoint_dir", tmp_path / "run"]
    process = script.start("train.py", *flags, *run, "--save_minutes", 10)
    wait_for_step(process, tmp_path / "run", 3)
    process.kill()
    process.join()
    bare = ["--resume", "--data_dir", data_dir, *run]
    fails("train.py", *bare, "--seed", 1, says="seed was 1337 and is now 1")  # from what weights?
    result = script("train.py", *bare)
    assert result.code == 0, result.output
    result = script("train.py", *flags, "--checkpoint_dir", tmp_path / "whole")
    assert result.code == 0, result.output
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


def test_init_from_takes_the_shape_and_refuses_another(script, fails, data_dir, run_dir, tmp_path):
    flags = ["--data_dir", data_dir, "--init_from", run_dir / "StoryGPT_best.pt", "--device", "cpu"]
    flags += ["--checkpoint_dir", tmp_path / "run", "--batch_size", "2", "--eval_windows", "4"]
    for changes, says in (
        (["--n_layer", "3"], "has n_layer 2, not 3"),
        (["--context_length", "65"], "has context_length 64, not 65"),
        (["--vocab_size", "600"], "has vocab_size 512, not 600"),
        (["--init_from", "gpt2"], "a Hub id, owner and name, as in openai-community/gpt2"),
        (["--init_from", "runs/none.pt"], "there is no runs/none.pt to start from"),
    ):
        fails("train.py", *flags, *changes, says=says)
    flags += ["--context_length", "32", "--dropout", "0", "--max_steps", "2", "--warmup_steps", "0"]
    flags += ["--grad_clip", "0", "--learning_rate"]
    fails("train.py", *flags, "1e30", says="a gradient norm of")  # and leaves a step 0 behind
    result = script("train.py", *flags, "1")  # too high as well: nothing is better than the start
    assert result.code == 0, result.output
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2]
    assert load_checkpoint(tmp_path / "run" / "StoryGPT_best.pt")["step"] == 0
    made = load_checkpoint(tmp_path / "run" / "StoryGPT_final.pt")
    assert made["gpt_config"].context_length == 32 and made["gpt_config"].n_layer == 2
    assert made["model_state_dict"]["wpe.weight"].shape == (32, 32)
    # Resumed, it keeps its own shape; it began with these weights, whatever they are called now.
    flags = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]
    shutil.copy(run_dir / "StoryGPT_best.pt", tmp_path / "moved.pt")
    result = script("train.py", *flags, "--init_from", tmp_path / "moved.pt")
    assert result.code == 0, result.output
    begun = origin_of(load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt"))
    assert begun["checkpoint"] == str(run_dir / "StoryGPT_best.pt")
    other = tmp_path / "run" / "StoryGPT_final.pt"
    fails("train.py", *flags, "--init_from", other, says=f"init_from was {run_dir}")


def test_a_shorter_context_keeps_the_first_positions(tmp_path):
    save_checkpoint(tmp_path / "a.pt", new_checkpoint())
    start = load_start(tmp_path / "a.pt")
    weights = fit_start(start, replace(SMALL, context_length=5))
    model = GPT(replace(SMALL, context_length=5)).eval()
    model.load_state_dict(weights)
    whole, _ = load_model(tmp_path / "a.pt")
    x = torch.arange(5)[None]
    assert torch.allclose(model(x)[0], whole(x)[0], atol=1e-6)
