"""Every number of a run: the model's shape, the training recipe, and the presets.

Standard library only: this file is published beside `model.py`, so that a checkpoint can be
loaded with nothing else of this repo. Field docstrings are the command-line help.
"""

from dataclasses import dataclass, fields
from typing import Literal

MAX_VOCAB_SIZE = 2**16  # token files are uint16


class InputError(ValueError):
    """Something the user can mend. Scripts print its one sentence and exit with status 1."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_numbers(config, positive: str, not_negative: str, fractions: str) -> None:
    """Checks types and ranges of the named fields; raises InputError with the first that is off."""
    for name in positive.split() + not_negative.split():
        value, least = getattr(config, name), 1 if name in positive.split() else 0
        whole = type(value) is int and value >= least
        _require(whole, f"{name} must be a whole number of at least {least}, not {value!r}")
    for name in fractions.split():
        value = getattr(config, name)
        inside = type(value) in (int, float) and 0 <= value < 1
        _require(inside, f"{name} must be at least 0 and below 1, not {value!r}")


def _require_choices(config) -> None:
    """Checks every field annotated as a Literal; raises InputError naming the choices."""
    for field in fields(config):
        choices = getattr(field.type, "__args__", ())
        if getattr(field.type, "__origin__", None) is Literal:
            value = getattr(config, field.name)
            listed = ", ".join(choices)
            _require(value in choices, f"{field.name} must be one of {listed}, not {value!r}")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 style decoder; the defaults have exactly 57,387,520 parameters.

    Raises InputError where the numbers do not fit together.
    """

    vocab_size: int = 50257
    """Number of token ids, the end-of-text id (the last) included."""
    context_length: int = 256
    """Most tokens the model looks back on."""
    n_layer: int = 10
    """Number of transformer blocks."""
    n_head: int = 8
    """Attention heads a block."""
    n_embd: int = 512
    """Width of the residual stream."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    bias: bool = True
    """Biases in the linear layers and layer norms, as in GPT-2."""
    init_std: float = 0.02
    """Standard deviation of the initial weights: GPT-2's. Narrow models learn faster from
    1 / sqrt(n_embd)."""

    def __post_init__(self):
        sizes = "vocab_size context_length n_layer n_head n_embd"
        _require_numbers(self, sizes, "", "dropout init_std")
        _require(type(self.bias) is bool, f"bias must be True or False, not {self.bias!r}")
        _require(
            self.vocab_size <= MAX_VOCAB_SIZE,
            f"vocab_size {self.vocab_size} is over {MAX_VOCAB_SIZE}, the most a uint16 token file "
            "can hold",
        )
        _require(
            self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe. A step is one optimizer update; the defaults see 65,536 tokens a step.

    Raises InputError where the numbers do not fit together.
    """

    batch_size: int = 64
    """Sequences in one micro-batch."""
    gradient_accumulation_steps: int = 4
    """Micro-batches in one step, over all processes together."""
    max_steps: int = 50_000
    """Steps in the whole run."""
    warmup_steps: int = 1_000
    """Steps of linear warm-up."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the cosine."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all weights, or muon for the blocks' matrices and adamw for the rest."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices and embeddings (never of biases and norms)."""
    beta1: float = 0.9
    """AdamW's decay of the gradient mean."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    story_windows: float = 0.0
    """Share of the training windows that start where a story starts; the others start anywhere."""
    eval_interval: int = 500
    """Steps between evaluations (the last step is always evaluated)."""
    eval_iters: int = 100
    """Batches of batch_size validation windows an evaluation averages over."""
    save_interval: int = 250
    """Steps between saves of StoryGPT_latest.pt: the most that a power cut costs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; auto takes bfloat16 where the GPU or CPU has it."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    compile: bool | None = None
    """Use torch.compile; None means on CUDA only."""
    seed: int = 1337
    """Seed of the initial weights, the batches and dropout."""

    def __post_init__(self):
        _require_numbers(
            self,
            "batch_size gradient_accumulation_steps max_steps eval_interval eval_iters"
            " save_interval",
            "warmup_steps seed",
            "beta1 beta2",
        )
        _require_choices(self)
        _require(0 <= self.story_windows <= 1, "story_windows must be between 0 and 1")
        for name in ("learning_rate", "min_lr", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            valid = type(value) in (int, float) and 0 <= value < float("inf")
            _require(valid, f"{name} must be a number of at least 0, not {value!r}")
        _require(
            self.warmup_steps < self.max_steps,
            f"warmup_steps {self.warmup_steps} leaves nothing of max_steps {self.max_steps}: "
            f"pass --warmup_steps {self.max_steps // 10}",
        )
        _require(
            self.min_lr <= self.learning_rate,
            f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}",
        )


# Each preset is the default of every flag that a command line leaves out.
PRESETS = {
    "storygpt": (GPTConfig(), TrainingConfig()),
    "demo": (
        GPTConfig(
            vocab_size=4096,
            context_length=192,
            n_layer=2,
            n_head=8,
            n_embd=128,
            dropout=0.0,
            init_std=0.09,
        ),
        TrainingConfig(
            batch_size=8,
            gradient_accumulation_steps=1,
            max_steps=1_500,
            warmup_steps=50,
            learning_rate=8e-3,
            min_lr=2e-4,
            dtype="float32",
            weight_decay=0.01,
            story_windows=0.75,
            eval_interval=150,
            eval_iters=10,
        ),
    ),
}
