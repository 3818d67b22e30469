"""Every number of a run: the model's shape, the training recipe, the sampling, and the presets.

Standard library only: this file is published beside `model.py`, so that a checkpoint can be
loaded with nothing else of this repo. Field docstrings are the command-line help.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

OptimizerName = Literal["adamw", "muon"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
PresetName = Literal["demo", "3m", "10m", "30m", "storygpt", "gpt2"]


class InputError(ValueError):
    """Something the user can mend. Scripts print its one sentence and exit with status 1."""


def may_change(default):
    """Declares a field in which a resumed run may differ: it decides when and where things are
    done, not what is learned."""
    return field(default=default, metadata={"may_change": True})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 style decoder; the defaults have exactly 57,387,520 parameters."""

    vocab_size: int = 50257
    """Number of token ids; the last is end-of-text, which follows every story."""
    context_length: int = 256
    """Most tokens the model sees at once."""
    n_layer: int = 10
    """Number of transformer blocks."""
    n_head: int = 8
    """Attention heads per block."""
    n_embd: int = 512
    """Width of the residual stream: how many numbers carry a token from block to block."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    bias: bool = True
    """Biases in the linear layers and layer norms, as in GPT-2."""
    init_std: float = 0.02
    """Standard deviation of the initial weights: GPT-2's. Narrow models learn faster from
    1 / sqrt(n_embd)."""

    def __post_init__(self):
        """Raises InputError where the numbers do not fit together."""
        check_gpt_config(self)


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe. A step is one optimizer update, by default on 64 × 4 × 256 = 65,536 tokens."""

    batch_size: int = 64
    """Windows, of context_length tokens each, in one micro-batch."""
    gradient_accumulation_steps: int = 4
    """Micro-batches in one step, over all processes; each has one in memory at a time."""
    max_steps: int = 50_000
    """Steps in the whole run."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises linearly to its peak; None takes 1,000, or a tenth of
    max_steps where that is less."""
    learning_rate: float | None = None
    """Peak learning rate; None takes 3e-4 for adamw and 2 / n_embd for muon."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine decay; None takes a tenth of the peak."""
    optimizer: OptimizerName = "adamw"
    """adamw, or muon (Jordan et al., 2024) for the blocks' matrices and adamw for the rest."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices and embeddings (never of biases and norms)."""
    beta1: float = 0.9
    """AdamW's decay of the gradient mean."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    story_windows: float = 0.0
    """Share of the training windows that are moved back to the start of the story they begin in."""
    eval_interval: int = 500
    """Steps between evaluations (the last step is always evaluated)."""
    eval_windows: int = 6_400
    """Windows of the validation split that an evaluation averages over."""
    save_minutes: float = may_change(10.0)
    """Minutes between saves of StoryGPT_latest.pt, which is the most that a power cut costs; and
    minutes for which saves may fail before the run ends."""
    keep_interval: int = may_change(0)
    """Steps between weights kept for good, as StoryGPT_step_005000.pt; 0 keeps none."""
    dtype: Precision = "auto"
    """Precision of the matrix products; auto takes bfloat16 where the GPU or CPU has it, else
    float16 on CUDA and float32 elsewhere."""
    device: str = may_change("auto")
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    compile: bool | None = may_change(None)
    """Use torch.compile; None means on CUDA only."""
    seed: int = 1337
    """Seed of the initial weights, the batches and dropout."""

    def __post_init__(self):
        """Raises InputError where the numbers do not fit together."""
        check_training_config(self)

    @property
    def windows_per_step(self) -> int:
        """Windows in one step, however they are cut into micro-batches."""
        return self.batch_size * self.gradient_accumulation_steps

    def filled_in(self, n_embd: int) -> "TrainingConfig":
        """Returns the same recipe with numbers for what is None, for a model of that width.

        Muon's 2 / n_embd was fitted at widths of 64, 128 and 256 (experiments/results/earlier.md).
        """
        peak = self.learning_rate
        if peak is None:
            match self.optimizer:
                case "adamw":
                    peak = 3e-4
                case "muon":
                    peak = 2 / n_embd
                case _:
                    raise InputError(f"no learning rate is known for {self.optimizer}: pass one")
        least = peak / 10 if self.min_lr is None else self.min_lr
        warmup = self.warmup_steps
        warmup = min(1_000, self.max_steps // 10) if warmup is None else warmup
        return replace(self, learning_rate=peak, min_lr=least, warmup_steps=warmup)


MAY_CHANGE = frozenset(f.name for f in fields(TrainingConfig) if f.metadata.get("may_change"))


@dataclass(frozen=True)
class Sampling:
    """How each token is drawn from a model's probabilities, as `GPT.generate` takes it."""

    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples the model's own probabilities."""
    top_k: int | None = 100
    """Sample among the k likeliest tokens; None among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""


@dataclass(frozen=True)
class GenerationSettings(Sampling):
    """How a story is generated: all that `GPT.generate` takes of it."""

    max_new_tokens: int = 200
    """Most tokens to add to the prompt."""


def preset(name: PresetName) -> tuple[GPTConfig, TrainingConfig]:
    """Returns the shape and the recipe of a preset, by size: docs/training.md says what to expect.

    Raises InputError where there is none of that name.
    """
    match name:
        case "demo":
            gpt = GPTConfig(
                vocab_size=4096,
                context_length=192,
                n_layer=2,
                n_head=8,
                n_embd=128,
                dropout=0.0,
                init_std=0.09,
            )
            training = TrainingConfig(
                batch_size=8,
                gradient_accumulation_steps=1,
                max_steps=1_500,
                warmup_steps=50,
                learning_rate=8e-3,
                min_lr=2e-4,
                weight_decay=0.01,
                story_windows=0.75,
                eval_interval=150,
                eval_windows=80,
                dtype="float32",
            )
            return gpt, training
        case "3m":
            gpt = GPTConfig(vocab_size=4096, n_layer=6, n_head=6, n_embd=192, dropout=0.0)
            return gpt, TrainingConfig(
                batch_size=32,
                gradient_accumulation_steps=1,
                max_steps=37_000,
                optimizer="muon",
            )
        case "10m":
            gpt = GPTConfig(vocab_size=8192, n_layer=6, n_head=5, n_embd=320, dropout=0.0)
            return gpt, TrainingConfig(
                batch_size=64,
                gradient_accumulation_steps=1,
                max_steps=31_000,
                optimizer="muon",
            )
        case "30m":
            gpt = GPTConfig(n_layer=6, n_head=6, n_embd=384)
            return gpt, TrainingConfig(
                batch_size=64,
                gradient_accumulation_steps=2,
                max_steps=31_000,
                optimizer="muon",
            )
        case "storygpt":
            return GPTConfig(), TrainingConfig()
        case "gpt2":
            gpt = GPTConfig(context_length=1024, n_layer=12, n_head=12, n_embd=768)
            return gpt, TrainingConfig()
        case _:
            known = ", ".join(get_args(PresetName))
            raise InputError(f"there is no preset {name}: pass one of {known}")


# --- Checks ---


MAX_VOCAB_SIZE = 2**16  # token files are uint16


def check_whole(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    """Raises InputError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if value > most:
        raise InputError(f"{name} {value} is over {most}, the most it can be here")


def check_fraction(name: str, value: float) -> None:
    """Raises InputError unless `value` is at least 0 and below 1."""
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise InputError(f"{name} must be at least 0 and below 1, not {value!r}")


def check_gpt_config(config: GPTConfig) -> None:
    """Raises InputError with the first number that is off."""
    for name, most in (
        ("vocab_size", MAX_VOCAB_SIZE),
        ("context_length", 2**20),
        ("n_layer", 1_000),
        ("n_head", 1_000),
        ("n_embd", 2**16),
    ):
        check_whole(name, getattr(config, name), 1, most)
    check_fraction("dropout", config.dropout)
    check_fraction("init_std", config.init_std)
    if type(config.bias) is not bool:
        raise InputError(f"bias must be True or False, not {config.bias!r}")
    if config.n_embd % config.n_head:
        raise InputError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")


def check_training_config(config: TrainingConfig) -> None:
    """Raises InputError with the first number that is off."""
    for name, least in (
        ("batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("max_steps", 1),
        ("eval_interval", 1),
        ("eval_windows", 1),
        ("keep_interval", 0),
    ):
        check_whole(name, getattr(config, name), least)
    if config.warmup_steps is not None:
        check_whole("warmup_steps", config.warmup_steps, 0)
    check_whole("seed", config.seed, 0, 2**63 - 1)
    for name in ("beta1", "beta2"):
        check_fraction(name, getattr(config, name))
    for name in ("learning_rate", "min_lr", "weight_decay", "grad_clip", "save_minutes"):
        value = getattr(config, name)
        if value is None and name in ("learning_rate", "min_lr"):
            continue
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise InputError(f"{name} must be a number of at least 0, not {value!r}")
    if not 0 <= config.story_windows <= 1:
        raise InputError("story_windows must be between 0 and 1")
    for name, kind in (("optimizer", OptimizerName), ("dtype", Precision)):
        value, choices = getattr(config, name), get_args(kind)
        if value not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    if config.warmup_steps is not None and config.warmup_steps >= config.max_steps:
        raise InputError(
            f"warmup_steps {config.warmup_steps} leaves nothing of max_steps {config.max_steps}: "
            f"leave it out, or pass --warmup_steps {config.max_steps // 10}"
        )
    if None not in (config.min_lr, config.learning_rate) and config.min_lr > config.learning_rate:
        raise InputError(f"min_lr {config.min_lr} is above learning_rate {config.learning_rate}")
