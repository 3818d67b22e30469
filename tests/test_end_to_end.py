"""The README's way, typed as in a shell: stories, tokens, a model, a score, a new story."""

import re

from conftest import TINY, python


def test_from_text_to_story(tmp_path):
    data, run = tmp_path / "data", tmp_path / "checkpoints"
    folder = ("--data_dir", data)
    flags = ("--dataset", "sample", "--vocab_size", 512, *folder)
    result = python("prepare_data.py", *flags)
    assert result.returncode == 0, result.stderr
    assert re.search(r"19,800 stories.*tokens\n.*200 stories", result.stdout)
    assert re.search(r"bytes a token, \d+ distinct ids of 512", result.stdout)

    result = python("train.py", *TINY, *folder, "--checkpoint_dir", run)
    assert result.returncode == 0, result.stderr
    assert "loss_plot.png" in result.stdout

    result = python("evaluate.py", *folder, "--checkpoint", run / "StoryGPT_best.pt")
    assert result.returncode == 0, result.stderr
    assert "bits per byte" in result.stdout

    flags = ("--checkpoint", run / "StoryGPT_best.pt", "--prompt", "Once upon a time")
    result = python("generate.py", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Once upon a time")


def test_one_step_of_the_57m_model_on_real_stories(script, real_data, tmp_path):
    # The reference's shape and recipe; only the batch and the evaluation are small.
    flags = "--max_steps 1 --warmup_steps 0 --batch_size 2 --gradient_accumulation_steps 1 "
    flags += "--eval_windows 2 --device cpu"
    folders = ("--data_dir", real_data, "--checkpoint_dir", tmp_path / "run")
    result = script("train.py", *flags.split(), *folders)
    assert result.code == 0, result.output
    assert "57,387,520 parameters" in result.output


def test_help_is_quick_to_have_and_complete(script):
    for name in ("prepare_data", "train", "evaluate"):
        result = script(f"{name}.py", "--help")
        assert result.code == 0 and "--seed" in result.output, result.output
    for name in ("generate", "upload_to_hf"):
        result = python("-X", "importtime", f"{name}.py", "--help")
        assert result.returncode == 0 and "--seed" in result.stdout, result.stderr
        assert " torch" not in result.stderr and " storygpt.cli" in result.stderr
