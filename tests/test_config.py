import subprocess
import sys

import pytest
from conftest import ROOT

from config import GPTConfig, InputError, TrainingConfig, preset


def test_defaults_are_the_reference():
    gpt, training = preset("storygpt")
    assert (gpt.n_layer, gpt.n_head, gpt.n_embd) == (10, 8, 512)
    assert (gpt.context_length, gpt.vocab_size, gpt.dropout, gpt.bias) == (256, 50257, 0.1, True)
    tokens = training.batch_size * training.gradient_accumulation_steps * gpt.context_length
    assert (tokens, training.max_steps) == (65_536, 50_000)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GPTConfig, {"n_head": 7}, "n_embd 512 is not divisible by n_head 7"),
        (GPTConfig, {"vocab_size": 70_000}, "vocab_size 70000 is over 65536"),
        (GPTConfig, {"n_layer": 0}, "n_layer must be a whole number of at least 1, not 0"),
        (GPTConfig, {"n_layer": 2.5}, "n_layer must be a whole number"),
        (GPTConfig, {"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        (GPTConfig, {"dropout": float("nan")}, "dropout must be"),
        (GPTConfig, {"bias": "no"}, "bias must be True or False"),
        (TrainingConfig, {"max_steps": 300}, "pass --warmup_steps 30"),
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


def test_learning_rates_are_chosen_by_optimizer_and_for_muon_by_width():
    chosen = TrainingConfig().with_learning_rates(512)
    assert (chosen.learning_rate, chosen.min_lr) == (3e-4, pytest.approx(3e-5))  # the reference's
    muon = TrainingConfig(optimizer="muon")
    rates = [muon.with_learning_rates(n).learning_rate for n in (64, 128, 256, 512)]
    assert rates == [2 / 64, 2 / 128, 2 / 256, 2 / 512]
    given = TrainingConfig(optimizer="muon", learning_rate=0.01, min_lr=0.0).with_learning_rates(64)
    assert (given.learning_rate, given.min_lr) == (0.01, 0.0)


def test_needs_only_the_standard_library():
    # -S leaves site-packages out; -I the environment
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import config"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
