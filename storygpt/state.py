"""What changes while training, and what StoryGPT_latest.pt holds, written and read side by side."""

import math
from dataclasses import dataclass
from pathlib import Path

from config import InputError, TrainingConfig
from model import GPT
from storygpt.checkpoint import load_weights
from storygpt.files import LATEST
from storygpt.optimizer import Optimizer


@dataclass(frozen=True)
class RunFacts:
    """What a run keeps for good, beside its settings."""

    record: dict
    """Its data, and the weights it started from (`record.begin_record`)."""
    dtype: str
    """Precision of the matrix products, as in `float32`."""
    run_id: str
    """The run's name for a tracker, if it ever had one; else empty."""
    card: str
    """What it runs on now, as the driver says."""
    micro_batch: int
    """Windows in one forward pass there: batch_size, or the largest divisor with memory enough."""


@dataclass
class TrainState:
    """What changes while training."""

    model: GPT
    optimizer: Optimizer
    step: int = 0
    val_loss: float = math.inf
    """Of the weights as they are now; infinite where they were not evaluated."""
    best_val_loss: float = math.inf
    skipped_steps: int = 0
    saved_step: int = 0

    def checkpoint(self, training: TrainingConfig, facts: RunFacts) -> dict:
        """Returns what every checkpoint holds."""
        return {
            "gpt_config": self.model.config,
            "training_config": training,
            "model_state_dict": self.model.state_dict(),
            "step": self.step,
            "val_loss": self.val_loss,
            "record": facts.record,
        }

    def resume_state(self, facts: RunFacts) -> dict:
        """Returns what StoryGPT_latest.pt holds beside it."""
        return {
            "best_val_loss": self.best_val_loss,
            "skipped_steps": self.skipped_steps,
            **vars(facts),
            **self.optimizer.state_dict(),
        }

    def load(self, latest: dict, path: Path) -> None:
        """Goes on from a StoryGPT_latest.pt read from `path`.

        Raises InputError where something is lacking or does not fit.
        """
        load_weights(self.model, latest["model_state_dict"], path)
        try:
            self.optimizer.load_state_dict(latest)
            self.step, self.saved_step = latest["step"], latest["step"]
            self.val_loss = latest["val_loss"]
            self.best_val_loss = latest["best_val_loss"]
            self.skipped_steps = latest["skipped_steps"]
        except Exception as error:  # load_state_dict raises whatever a foreign state runs into
            raise InputError(
                f"{path} cannot be resumed: its optimizer state does not fit its model; start "
                "without --resume in another --checkpoint_dir"
            ) from error

    def stop_if_diverged(self, entry: dict, directory: Path, training: TrainingConfig) -> None:
        """Raises InputError, before anything is saved, where training has gone wrong for good.

        `entry` is what metrics.jsonl would say of the step.
        """
        loss, norm = entry.get("val_loss", entry.get("train_loss")), entry.get("grad_norm")
        # A norm of exactly 0 is no minimum but gradients that got lost; None is a skipped step's.
        learning = norm is None or (math.isfinite(norm) and norm > 0)
        if math.isfinite(loss) and learning and not self.optimizer.collapsed:
            return
        good = f"the last good checkpoint is {directory / LATEST}"
        raise InputError(
            f"step {self.step} has a loss of {loss} and a gradient norm of {norm}; "
            f"{good if self.saved_step else 'no step was saved'}. Likely causes: too high a "
            f"--learning_rate ({training.learning_rate}), too few --warmup_steps "
            f"({training.warmup_steps}), or --dtype float16 (try bfloat16 or float32)"
        )
