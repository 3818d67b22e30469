import subprocess
import sys
from dataclasses import asdict
from typing import get_args

import pytest
from conftest import ROOT

from config import GPTConfig, InputError, PresetName, TrainingConfig, preset

# The reference's own table, field by field, and what it leaves to us: GPT-2's initialization and
# betas, and how often to save.
REFERENCE = {
    "vocab_size": 50257, "context_length": 256, "n_layer": 10, "n_head": 8, "n_embd": 512,
    "dropout": 0.1, "bias": True, "init_std": 0.02,
    "batch_size": 64, "gradient_accumulation_steps": 4, "max_steps": 50_000, "warmup_steps": 1_000,
    "learning_rate": 3e-4, "min_lr": 3e-5, "optimizer": "adamw", "weight_decay": 0.1,
    "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "story_windows": 0.0, "eval_interval": 500,
    "eval_windows": 6_400, "save_minutes": 10.0, "keep_interval": 0, "dtype": "auto",
    "device": "auto", "compile": None, "seed": 1337,
}  # fmt: skip


def test_the_default_is_the_reference():
    gpt, training = preset("storygpt")
    assert (gpt, training) == (GPTConfig(), TrainingConfig())
    chosen = asdict(gpt) | asdict(training.filled_in(gpt.n_embd))
    assert chosen.pop("min_lr") == pytest.approx(REFERENCE["min_lr"])  # a tenth of 3e-4, rounded
    assert chosen == {key: value for key, value in REFERENCE.items() if key != "min_lr"}


def test_every_preset_is_complete_and_another_name_is_refused():
    for name in get_args(PresetName):
        gpt, training = preset(name)
        assert training.filled_in(gpt.n_embd).learning_rate > 0
    with pytest.raises(InputError, match="there is no preset large"):
        preset("large")


def test_an_optimizer_of_another_name_gets_no_learning_rate():
    recipe = TrainingConfig()
    object.__setattr__(recipe, "optimizer", "sgd")  # as one whose checks somebody forgot
    with pytest.raises(InputError, match="sgd"):
        recipe.filled_in(512)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GPTConfig, {"n_head": 7}, "n_embd 512 is not divisible by n_head 7"),
        (GPTConfig, {"vocab_size": 70_000}, "vocab_size 70000 is over 65536"),
        (GPTConfig, {"n_layer": 0}, "n_layer must be a whole number of at least 1, not 0"),
        (GPTConfig, {"n_layer": 2.5}, "n_layer must be a whole number"),
        (GPTConfig, {"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        (GPTConfig, {"dropout": float("nan")}, "dropout must be"),
        (GPTConfig, {"init_std": -0.02}, "init_std must be at least 0"),
        (GPTConfig, {"bias": "no"}, "bias must be True or False"),
        (TrainingConfig, {"max_steps": 300, "warmup_steps": 300}, "pass --warmup_steps 30"),
        (TrainingConfig, {"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0"),
        (TrainingConfig, {"eval_windows": 0}, "eval_windows must be a whole number of at least 1"),
        (
            TrainingConfig,
            {"learning_rate": 3e-4, "min_lr": 1.0},
            "min_lr 1.0 is above learning_rate 0.0003",
        ),
        (TrainingConfig, {"learning_rate": -1}, "learning_rate must be a number of at least 0"),
        (TrainingConfig, {"learning_rate": float("inf")}, "learning_rate must be a number"),
        (TrainingConfig, {"optimizer": "sgd"}, "optimizer must be one of adamw, muon"),
        (TrainingConfig, {"dtype": "float8"}, "dtype must be one of auto, float32"),
        (TrainingConfig, {"beta2": 1.0}, "beta2 must be at least 0 and below 1"),
    ],
)
def test_mistakes_are_named(kind, fields, message):
    with pytest.raises(InputError, match=message) as error:
        kind(**fields)
    assert "\n" not in str(error.value)


def test_a_warm_up_left_out_is_a_tenth_of_a_short_run():
    for steps, warmup in ((5, 0), (300, 30), (10_000, 1_000), (50_000, 1_000)):
        assert TrainingConfig(max_steps=steps).filled_in(512).warmup_steps == warmup
    assert TrainingConfig(max_steps=300, warmup_steps=7).filled_in(512).warmup_steps == 7


def test_learning_rates_are_chosen_by_optimizer_and_for_muon_by_width():
    chosen = TrainingConfig().filled_in(512)
    assert (chosen.learning_rate, chosen.min_lr) == (3e-4, pytest.approx(3e-5))  # the reference's
    muon = TrainingConfig(optimizer="muon")
    rates = [muon.filled_in(n).learning_rate for n in (64, 128, 256, 512)]
    assert rates == [2 / 64, 2 / 128, 2 / 256, 2 / 512]
    given = TrainingConfig(optimizer="muon", learning_rate=0.01, min_lr=0.0).filled_in(64)
    assert (given.learning_rate, given.min_lr) == (0.01, 0.0)


def test_needs_only_the_standard_library():
    # -S leaves site-packages out; -I the environment
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import config"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
