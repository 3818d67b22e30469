"""Steps that a GPU's memory does not hold in one piece, with small_gpu.py for the GPU."""

import pytest
from conftest import TINY, losses_of
from test_distributed import ended, ranks

from storygpt.checkpoint import load_checkpoint


@pytest.fixture
def flags(data_dir):
    return [*TINY, "--max_steps", "6", "--dropout", "0", "--data_dir", data_dir]


@pytest.fixture
def whole(script, flags, tmp_path) -> list[float]:
    """The losses of a run whose micro-batches of four windows fit."""
    result = script("small_gpu.py", *flags, "--checkpoint_dir", tmp_path / "whole", ROWS="4")
    assert result.code == 0 and "windows at a time" not in result.output, result.output
    return losses_of(tmp_path / "whole")


def test_a_step_that_does_not_fit_is_cut_and_the_losses_stay(script, flags, whole, tmp_path):
    cut = script("small_gpu.py", *flags, "--checkpoint_dir", tmp_path / "cut", ROWS="3")
    assert cut.code == 0 and "2 of 4 windows at a time" in cut.output, cut.output
    assert losses_of(tmp_path / "cut") == pytest.approx(whole, rel=1e-5)
    assert load_checkpoint(tmp_path / "cut" / "StoryGPT_latest.pt")["micro_batch"] == 2


def test_all_processes_take_what_fits_the_smallest_card(script, flags, whole, tmp_path):
    flags += ["--checkpoint_dir", tmp_path / "cut"]
    codes, outputs = ended(ranks(script, *flags, name="small_gpu.py", ROWS=("4", "2")))
    assert codes == [0, 0] and "2 of 4 windows at a time" in outputs[0], outputs
    assert losses_of(tmp_path / "cut") == pytest.approx(whole, rel=1e-5)


def test_a_resumed_run_keeps_its_cut_on_its_card_and_tries_anew_on_another(script, flags, tmp_path):
    def trained(name: str, *more, code: int = 0, **environment) -> dict:
        where = ("--dropout", "0.1", "--checkpoint_dir", tmp_path / name)
        result = script("small_gpu.py", *flags, *where, *more, **environment)
        assert result.code == code, result.output
        return load_checkpoint(tmp_path / name / "StoryGPT_latest.pt")

    trained("cut", ROWS="2")
    short = ("--resume", "--max_hours", "1e-9")
    assert trained("parts", *short, code=75, ROWS="2")["micro_batch"] == 2
    assert trained("parts", *short, code=75, ROWS="4")["micro_batch"] == 2
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "cut")[:2]
    wider = ("--batch_size", 8, "--gradient_accumulation_steps", 1)  # is asked for, and tried
    assert trained("parts", *short, *wider, code=75, ROWS="8")["micro_batch"] == 8
    assert trained("parts", "--resume", ROWS="4", CARD="NVIDIA H100")["micro_batch"] == 4


def test_out_of_memory_later_names_flags_that_resume_takes(script, fails, flags, whole, tmp_path):
    flags += ["--checkpoint_dir", tmp_path / "run"]
    less = "--batch_size 2 --gradient_accumulation_steps 4 --resume"
    says = f"there is not enough memory; the same run in less: {less}"
    fails("small_gpu.py", *flags, ROWS="4", LATER="9", says=says)
    result = script("small_gpu.py", *flags, *less.split(), ROWS="4")
    assert result.code == 0, result.output
    assert losses_of(tmp_path / "run") == pytest.approx(whole, rel=1e-5)


def test_a_model_of_which_not_one_window_fits_is_one_sentence(fails, flags, tmp_path):
    flags += ["--checkpoint_dir", tmp_path / "run"]
    says = "NVIDIA T4 has not enough memory for a step on one window: pass a smaller"
    fails("small_gpu.py", *flags, ROWS="0", says=says)
