"""Script: the training loop, from prepared data to the best checkpoint.

Read `train` top to bottom, then what it calls. One process, or as many as `torchrun` starts.
Nothing random is kept between steps: the batch of a step and its dropout are functions of (seed,
step, micro-batch), so a resumed run is the run it resumes, and N processes do what one would.
"""

from storygpt import cli  # first: it answers Ctrl-C while torch loads

# isort: split

import math
import secrets
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

from config import GPTConfig, InputError, TrainingConfig, preset
from model import GPT
from storygpt.checkpoint import BEST, FINAL, LATEST
from storygpt.device import (
    autocast,
    check_fits,
    compile_model,
    dtype_name,
    pick_device,
    pick_dtype,
    to_device,
)
from storygpt.distributed import MORE_TO_DO, Processes
from storygpt.kernels import chunked_cross_entropy
from storygpt.losses import estimate_loss
from storygpt.metrics import Log, start_tracker
from storygpt.optimizer import Optimizer
from storygpt.run_folder import RunFolder, TrainState, step_name
from storygpt.token_files import (
    data_fingerprint,
    load_meta,
    load_tokens,
    mixed_seed,
    training_batch,
    windows_per_epoch,
)


@dataclass(frozen=True)
class Start:
    """What the defaults of all other flags depend on."""

    preset: Literal["storygpt", "demo"] | None = None
    """Where the defaults of all other fields come from: storygpt, the 57M reference, unless a run
    is resumed; or demo, a small model."""
    checkpoint_dir: Path = Path("checkpoints")
    """Folder for checkpoints, metrics.jsonl and loss_plot.png."""
    resume: bool = False
    """Continue the run in checkpoint_dir with its own settings, or start it if there is none."""


@dataclass(frozen=True)
class Arguments(Start):
    """Train a GPT on prepared data. With torchrun, on several processes."""

    gpt: tyro.conf.FlagConversionOff[GPTConfig] = field(default_factory=GPTConfig)
    training: tyro.conf.FlagConversionOff[TrainingConfig] = field(default_factory=TrainingConfig)
    data_dir: Path = Path("data")
    """Folder that prepare_data.py wrote."""
    max_hours: float | None = None
    """Save and stop in time to end within these hours, with exit status 75 if there is more to
    do: the same command with --resume goes on."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Where to send the metrics too."""


@dataclass(frozen=True)
class Setting:
    """What stays as it is while training."""

    arguments: Arguments
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    train_tokens: np.ndarray
    val_tokens: np.ndarray
    story_ends: np.ndarray | None
    tokens_per_step: int
    steps_per_epoch: float
    remembered: dict  # by StoryGPT_latest.pt: data, dtype, run_id


def main() -> None:
    cli.never_stop_for_output()
    arguments, resumed = parse_arguments()
    try:
        setting, state = set_up(arguments, resumed)
        status = train(setting, state)
    except Exception as error:
        raise cli.with_advice(error, arguments.training) from error
    setting.processes.part()
    sys.exit(status)


# --- Setting up ---


def parse_arguments() -> tuple[Arguments, dict | None]:
    """The command line, and the checkpoint to resume from (None for a new run).

    Raises InputError where a run would be overwritten or changed.
    """
    start = cli.parse_first(Start)
    folder = RunFolder(start.checkpoint_dir)
    resumed = folder.unfinished() if start.resume or Processes().restarted else None
    gpt, training = preset(start.preset or "storygpt")
    if resumed and not start.preset:
        gpt, training = resumed["gpt_config"], resumed["training_config"]
    defaults = Arguments(checkpoint_dir=start.checkpoint_dir, gpt=gpt, training=training)
    arguments = cli.parse_flags(Arguments, defaults)
    if arguments.max_hours is not None and not 0 < arguments.max_hours < math.inf:
        raise InputError(f"max_hours must be above 0, not {arguments.max_hours}")
    if resumed:
        folder.check_same_run(resumed, arguments.gpt, arguments.training)
    else:
        folder.check_unused()
    return arguments, resumed


def set_up(arguments: Arguments, resumed: dict | None) -> tuple[Setting, TrainState]:
    """What a new run, or the `resumed` one, trains with. Raises InputError."""
    gpt, config = arguments.gpt, arguments.training
    processes = Processes()
    processes.share(config.gradient_accumulation_steps)  # complains before anything is started
    device = processes.meet(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)

    meta = load_meta(arguments.data_dir, gpt.vocab_size)
    if resumed and resumed.get("data") != data_fingerprint(meta):
        raise InputError(
            f"the data in {arguments.data_dir} is not what the run in {arguments.checkpoint_dir} "
            "was trained on: pass its --data_dir"
        )
    train_tokens, val_tokens = (
        load_tokens(arguments.data_dir, split, meta, gpt.context_length, verify=processes.is_main)
        for split in ("train", "validation")
    )

    story_ends = None
    if config.story_windows:
        story_ends = np.flatnonzero(train_tokens == meta["end_of_text"])
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # has given gradients that are no numbers
    check_fits(gpt, config.batch_size, device)
    model = GPT(gpt).to(device)
    model.loss_function = chunked_cross_entropy
    state = TrainState(model, Optimizer(model, config, device, dtype))
    remembered = {
        "data": data_fingerprint(meta),
        "dtype": dtype_name(dtype),
        "run_id": resumed["run_id"] if resumed else "",
    }
    if arguments.tracker != "none" and not remembered["run_id"]:
        remembered["run_id"] = secrets.token_hex(4)
    if resumed:
        state.load(resumed, arguments.checkpoint_dir / LATEST)
        if resumed["dtype"] != remembered["dtype"]:
            print(f"this run was in {resumed['dtype']} and goes on in {remembered['dtype']}")
    windows = config.batch_size * config.gradient_accumulation_steps
    steps_per_epoch = windows_per_epoch(len(train_tokens), gpt.context_length) / windows
    numbers = (config.tokens_per_step(gpt.context_length), steps_per_epoch)
    tokens = (train_tokens, val_tokens, story_ends, *numbers)
    return Setting(arguments, processes, device, dtype, *tokens, remembered), state


# --- The loop ---


def train(setting: Setting, state: TrainState) -> int:
    """Trains to the last step, or until asked to stop; returns the exit status."""
    config, processes = setting.arguments.training, setting.processes
    compiled = compile_model(state.model, config.compile, setting.device)
    model = processes.wrap(compiled, setting.device)
    signals = cli.listen_for_signals(processes.launched)
    folder, log = open_folder(setting, state) if processes.is_main else (None, None)
    deadline = cli.STARTED + 3600 * (setting.arguments.max_hours or math.inf)
    longest = time.monotonic() - cli.STARTED  # that nobody looked at the clock
    saved, status = time.monotonic(), 0
    state.model.train()
    with log or nullcontext():
        while state.step < config.max_steps and not status:
            # --- One step ---
            start = time.monotonic()
            late = processes.is_main and start + 2 * longest > deadline
            status = 128 + signals[0] if signals else MORE_TO_DO if late else 0
            entry, status = train_step(setting, state, model, status)
            speed = setting.tokens_per_step / (time.monotonic() - start)
            entry["tokens_per_second"] = round(speed, 1)

            # --- Check and evaluate ---
            check(setting, state, entry)
            last = state.step == config.max_steps
            status = 0 if last else status
            if last or state.step % config.eval_interval == 0:
                loss = validate(setting, compiled, config.eval_iters, processes)
                state.val_loss = entry["val_loss"] = loss
                check(setting, state, entry)
            if not processes.is_main:
                continue

            # --- Save ---
            if "val_loss" in entry:
                log.attempt(log.add_sample, entry, state.model, config.seed)
            folder.append(entry)
            names = [FINAL] if last else []
            if entry.get("val_loss", math.inf) < state.best_val_loss:
                state.best_val_loss = state.val_loss
                names.append(BEST)
            if config.keep_interval and state.step % config.keep_interval == 0:
                names.append(step_name(state.step))
            if names or status or start - saved >= 60 * config.save_minutes:
                if "val_loss" not in entry:  # a step's own loss is that of the weights before it
                    glance = {"val_loss": validate(setting, state.model, 1)}
                    check(setting, state, entry | glance)
                save(setting, state, folder, [*names, LATEST])
                saved = start

            # --- Log ---
            log.add(entry)
            longest = max(longest, time.monotonic() - start)
        if processes.is_main:
            folder.wait()
    if processes.is_main:
        directories = {"data_dir": setting.arguments.data_dir, "checkpoint_dir": folder.directory}
        print(log.ending(status, state.best_val_loss, directories))
    # torchrun would take any other status for a death, and start all processes anew.
    return 0 if status == MORE_TO_DO and processes.launched else status


def train_step(
    setting: Setting, state: TrainState, model: nn.Module, status: int
) -> tuple[dict, int]:
    """One optimizer update: what metrics.jsonl says of it, and the exit status of all processes if
    one wants to stop, or 0. `model` is state.model, compiled and wrapped as the run wants it."""
    gpt, config = setting.arguments.gpt, setting.arguments.training
    own = setting.processes.share(config.gradient_accumulation_steps)
    state.step += 1
    loss_sum = torch.zeros((), device=setting.device)
    for micro_batch in own:
        first = micro_batch * config.batch_size
        positions = range(first, first + config.batch_size)
        x, y = training_batch(
            setting.train_tokens,
            config.seed,
            state.step,
            positions,
            config.batch_size * config.gradient_accumulation_steps,
            gpt.context_length,
            setting.story_ends,
            config.story_windows,
        )
        setting.processes.synchronize_gradients(model, micro_batch == own[-1])
        torch.manual_seed(mixed_seed(config.seed, state.step, micro_batch))
        with autocast(setting.device, setting.dtype):
            _, loss = model(to_device(x, setting.device), to_device(y, setting.device))
        state.optimizer.backward(loss / len(own))
        loss_sum += loss.detach()
    learning_rate = state.optimizer.learning_rate
    grad_norm, skipped = state.optimizer.step()
    state.skipped_steps += skipped
    means, status = setting.processes.report([loss_sum / len(own), grad_norm], status)
    entry = {
        "step": state.step,
        "tokens": state.step * setting.tokens_per_step,
        "epoch": round(state.step / setting.steps_per_epoch, 4),
        "train_loss": means[0],
        "learning_rate": learning_rate,
        "grad_norm": None if skipped else means[1],
    }
    if setting.dtype == torch.float16:
        entry["skipped_steps"] = state.skipped_steps
    return entry, status


def check(setting: Setting, state: TrainState, entry: dict) -> None:
    """Raises InputError, before anything is saved, where training has gone wrong for good."""
    loss, norm = entry.get("val_loss", entry["train_loss"]), entry["grad_norm"]
    # A norm of exactly 0 is not a minimum but gradients that got lost; None is a skipped step's.
    learning = norm is None or (math.isfinite(norm) and norm > 0)
    if math.isfinite(loss) and learning and not state.optimizer.collapsed:
        return
    config, latest = setting.arguments.training, setting.arguments.checkpoint_dir / LATEST
    saved = f"the last good checkpoint is {latest}" if state.saved_step else "no step was saved"
    raise InputError(
        f"step {state.step} has a loss of {loss} and a gradient norm of {norm}; {saved}. Likely "
        f"causes: too high a --learning_rate ({config.learning_rate}), too few --warmup_steps "
        f"({config.warmup_steps}), or --dtype float16 (try bfloat16 or float32)"
    )


def validate(setting: Setting, model: nn.Module, num_batches: int, *processes) -> float:
    """The mean loss over so many batches of validation windows, in nats a token."""
    length, size = setting.arguments.gpt.context_length, setting.arguments.training.batch_size
    where = (setting.device, setting.dtype, *processes)
    return estimate_loss(model, setting.val_tokens, length, size, num_batches, *where)


# --- What rank 0 keeps and says ---


def open_folder(setting: Setting, state: TrainState) -> tuple[RunFolder, Log]:
    """The run's folder, with a first checkpoint so that a disk that cannot hold one is found now,
    and its log."""
    arguments, number = setting.arguments, len(setting.train_tokens)
    config, folder = arguments.training, RunFolder(arguments.checkpoint_dir)
    settings = asdict(arguments.gpt) | asdict(config)
    track = start_tracker(
        arguments.tracker, settings, setting.remembered["run_id"], folder.directory
    )
    metrics = folder.open(state.step)
    save(setting, state, folder, [LATEST])
    folder.wait()
    epochs = config.max_steps / setting.steps_per_epoch
    print(
        f"{state.model.num_parameters():,} parameters on {setting.processes.world_size} × "
        f"{setting.device.type}, {dtype_name(setting.dtype)}; {number:,} train tokens, "
        f"{setting.tokens_per_step:,} a step, {epochs:.1f} epochs"
    )
    flops = state.model.flops_per_token() / setting.processes.world_size
    speed = (flops, setting.device, setting.dtype)
    return folder, Log(metrics, state.step, config.max_steps, folder.directory, track, *speed)


def save(setting: Setting, state: TrainState, folder: RunFolder, names: list[str]) -> None:
    """Saves the weights as each of `names`, and as StoryGPT_latest.pt all that resuming needs."""
    state.saved_step = state.step
    weights = state.weights(setting.arguments.gpt, setting.arguments.training)
    folder.save(names, weights, state.rest() | setting.remembered)


if __name__ == "__main__":
    cli.run(main)
