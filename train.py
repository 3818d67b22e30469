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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

from config import GPTConfig, InputError, TrainingConfig, preset
from model import GPT
from storygpt import device as machine
from storygpt.checkpoint import BEST, FINAL, LATEST, fit_start, load_start, load_weights
from storygpt.distributed import MORE_TO_DO, Processes
from storygpt.kernels import compile_model, speed_up_training
from storygpt.losses import estimate_loss
from storygpt.metrics import Log, start_tracker
from storygpt.optimizer import Optimizer
from storygpt.run_folder import RunFolder, TrainState, check_same_data, step_name
from storygpt.token_files import Batches, data_fingerprint, load_meta, load_tokens, mixed_seed


@dataclass(frozen=True)
class FirstFlags:
    """What the defaults of all other flags depend on."""

    preset: Literal["storygpt", "demo", "gpt2"] | None = None
    """Where all other defaults come from: storygpt, the 57M reference; demo, small; gpt2, 124M."""
    checkpoint_dir: Path = Path("checkpoints")
    """Folder for checkpoints, metrics.jsonl and loss_plot.png."""
    resume: bool = False
    """Continue the run in checkpoint_dir with its own settings, or start it if there is none."""
    init_from: Path | None = None
    """Start from these weights and their shape: a .pt file, a GPT-2 folder, or a Hub id."""


@dataclass(frozen=True)
class Arguments(FirstFlags):
    """Train a GPT on prepared data. With torchrun, on several processes."""

    gpt: tyro.conf.FlagConversionOff[GPTConfig] = field(default_factory=GPTConfig)
    training: tyro.conf.FlagConversionOff[TrainingConfig] = field(default_factory=TrainingConfig)
    data_dir: Path = Path("data")
    """Folder that prepare_data.py wrote."""
    max_hours: float | None = None
    """Save and end in time for these hours; exit status 75 says that --resume has more to do."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Where to send the metrics too."""


@dataclass(frozen=True)
class Setting:
    """What stays as it is while training."""

    arguments: Arguments
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    batches: Batches
    val_tokens: np.ndarray
    remembered: dict  # kept in StoryGPT_latest.pt: data, dtype, run_id, init_from


def main() -> None:
    cli.never_stop_for_output()  # a closed pipe or a full disk costs what is printed, not the run
    arguments, resumed, start = parse_arguments()
    try:
        setting, state = set_up(arguments, resumed, start)
        status = train(setting, state)
    except Exception as error:
        raise cli.with_advice(error, arguments.training) from error
    setting.processes.part()
    sys.exit(status)


# --- Setting up ---


def parse_arguments() -> tuple[Arguments, dict | None, tuple | None]:
    """The command line, the checkpoint to resume from and the one to start from, or None each.

    Raises InputError where a run would be overwritten or changed.
    """
    first = cli.parse_first(FirstFlags)
    folder = RunFolder(first.checkpoint_dir)
    resumed = folder.unfinished() if first.resume or Processes().restarted else None
    start = load_start(first.init_from) if first.init_from else None  # shape, weights, origin
    gpt, training = preset(first.preset or "storygpt")
    if resumed and not first.preset:
        gpt, training = resumed["gpt_config"], resumed["training_config"]
    elif start:
        gpt = start[0]
    defaults = Arguments(checkpoint_dir=first.checkpoint_dir, gpt=gpt, training=training)
    arguments = cli.parse_flags(Arguments, defaults)
    training = arguments.training.with_learning_rates(arguments.gpt.n_embd)
    arguments = replace(arguments, training=training)
    if arguments.max_hours is not None and not 0 < arguments.max_hours < math.inf:
        raise InputError(f"max_hours must be above 0, not {arguments.max_hours}")
    if resumed:
        folder.check_same_run(resumed, arguments.gpt, training, start and start[2])
    else:
        folder.check_unused()
    if first.resume and Processes().is_main:
        print(f"resuming after step {resumed['step']:,}" if resumed else "starting a new run")
    return arguments, resumed, start


def set_up(
    arguments: Arguments, resumed: dict | None, start: tuple | None
) -> tuple[Setting, TrainState]:
    """What a new run, or the `resumed` one, trains with. Raises InputError."""
    gpt, config = arguments.gpt, arguments.training
    processes = Processes()
    processes.share(config.gradient_accumulation_steps)  # complains before anything is started
    device = processes.meet(machine.pick_device(config.device))
    dtype = machine.pick_dtype(config.dtype, device)
    torch.set_float32_matmul_precision("high")  # TF32, where a run in float32 is on CUDA
    machine.check_fits(gpt, config.batch_size, device)

    start_weights = fit_start(start, gpt) if start else None
    meta = load_meta(arguments.data_dir, gpt.vocab_size)
    remembered = {"data": data_fingerprint(meta), "dtype": machine.dtype_name(dtype)}
    if resumed:
        check_same_data(resumed, remembered["data"], arguments.data_dir)
    train_tokens, val_tokens = (
        load_tokens(arguments.data_dir, split, meta, gpt.context_length, verify=processes.is_main)
        for split in ("train", "validation")
    )
    windows_per_step = config.batch_size * config.gradient_accumulation_steps
    how = (config.seed, windows_per_step, gpt.context_length, config.story_windows)
    batches = Batches(train_tokens, meta["end_of_text"], *how)

    torch.manual_seed(config.seed)
    model = GPT(gpt).to(device)
    speed_up_training(model, device)
    state = TrainState(model, Optimizer(model, config, device, dtype))
    if resumed:
        state.load(resumed, arguments.checkpoint_dir / LATEST)
    elif start:
        load_weights(model, start_weights, arguments.init_from)
    remembered["init_from"] = resumed.get("init_from") if resumed else start and start[2]
    new_id = secrets.token_hex(4) if arguments.tracker != "none" else ""
    remembered["run_id"] = (resumed or {}).get("run_id") or new_id  # kept without its tracker, too
    if resumed and resumed["dtype"] != remembered["dtype"]:
        print(f"this run was in {resumed['dtype']} and goes on in {remembered['dtype']}")
    setting = Setting(arguments, processes, device, dtype, batches, val_tokens, remembered)
    return setting, state


# --- The loop ---


def train(setting: Setting, state: TrainState) -> int:
    """Trains to the last step, or until asked to stop; returns the exit status."""
    arguments, processes = setting.arguments, setting.processes
    config = arguments.training
    compiled = compile_model(state.model, config.compile, setting.device)
    model = processes.wrap(compiled, setting.device)
    signals = cli.listen_for_signals(processes.launched)
    folder, log = open_folder(setting, state) if processes.is_main else (None, None)
    deadline = cli.STARTED + 3600 * (arguments.max_hours or math.inf)
    longest = time.monotonic() - cli.STARTED  # seconds between two looks at the clock
    saved, status = time.monotonic(), 0
    if setting.remembered["init_from"] and state.step == 0:
        evaluate_start(setting, state, compiled, folder, log)
    with log or nullcontext():
        while state.step < config.max_steps and not status:
            # --- One step ---
            start = time.monotonic()
            late = processes.is_main and start + 2 * longest > deadline  # no time for one more
            status = 128 + signals[0] if signals else MORE_TO_DO if late else 0
            entry, status = train_step(setting, state, model, status)
            speed = setting.batches.tokens_per_step / (time.monotonic() - start)
            entry["tokens_per_second"] = round(speed, 1)

            # --- End a diverged run, evaluate ---
            state.check(entry, arguments.checkpoint_dir, config)
            last = state.step == config.max_steps
            status = 0 if last else status
            if last or state.step % config.eval_interval == 0:
                loss = validate(setting, compiled, config.eval_iters, processes)
                state.val_loss = entry["val_loss"] = loss
                state.check(entry, arguments.checkpoint_dir, config)
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
                if "val_loss" not in entry:  # train_loss is of the old weights: check the new ones
                    glance = {"val_loss": validate(setting, state.model, 1)}
                    state.check(entry | glance, folder.directory, config)
                save(setting, state, folder, [*names, LATEST])
                saved = start

            # --- Log ---
            log.add(entry)
            longest = max(longest, time.monotonic() - start)
        if processes.is_main:
            folder.wait()  # saving goes on in the background
    if processes.is_main:
        print(log.ending(status, state.best_val_loss, arguments.data_dir, arguments.tracker))
    # torchrun would take any other status for a death, and start all processes anew.
    return 0 if status == MORE_TO_DO and processes.launched else status


def train_step(
    setting: Setting, state: TrainState, model: nn.Module, status: int
) -> tuple[dict, int]:
    """One optimizer update: its line of metrics.jsonl, and the exit status that all processes agree
    on (0: go on), given each one's `status`. `model`: state.model, perhaps compiled and wrapped."""
    config, processes, device = setting.arguments.training, setting.processes, setting.device
    own = processes.share(config.gradient_accumulation_steps)
    state.step, state.val_loss = state.step + 1, math.inf  # what was measured is of older weights
    loss_sum = torch.zeros((), device=device)
    for micro_batch in own:
        first = micro_batch * config.batch_size
        x, y = setting.batches(state.step, range(first, first + config.batch_size))
        processes.synchronize_gradients(model, micro_batch == own[-1])
        torch.manual_seed(mixed_seed(config.seed, state.step, micro_batch))  # of dropout
        with machine.autocast(device, setting.dtype):
            _, loss = model(machine.to_device(x, device), machine.to_device(y, device))
        state.optimizer.backward(loss / len(own))  # DDP averages over processes
        loss_sum += loss.detach()
    learning_rate = state.optimizer.learning_rate
    grad_norm, skipped = state.optimizer.step()  # clips and moves the schedule on, too
    state.skipped_steps += skipped
    means, status = processes.report([loss_sum / len(own), grad_norm], status)
    entry = {
        "step": state.step,
        "tokens": state.step * setting.batches.tokens_per_step,
        "epoch": round(state.step / setting.batches.steps_per_epoch, 4),
        "train_loss": means[0],
        "learning_rate": learning_rate,
        "grad_norm": None if skipped else means[1],
    }
    if setting.dtype == torch.float16:  # steps that overflow are skipped
        entry["skipped_steps"] = state.skipped_steps
    return entry, status


def validate(setting: Setting, model: nn.Module, num_batches: int, *processes) -> float:
    """Mean loss in nats a token over `num_batches` validation batches, which `processes` share."""
    length, size = setting.arguments.gpt.context_length, setting.arguments.training.batch_size
    where = (setting.device, setting.dtype, *processes)
    return estimate_loss(model, setting.val_tokens, length, size, num_batches, *where)


def evaluate_start(setting: Setting, state: TrainState, model: nn.Module, folder, log) -> None:
    """Step 0 of a run that starts from another's weights: what they know of this data."""
    config = setting.arguments.training
    loss = validate(setting, model, config.eval_iters, setting.processes)
    state.val_loss = state.best_val_loss = loss
    entry = {"step": 0, "tokens": 0, "epoch": 0.0, "val_loss": loss}
    state.check(entry, setting.arguments.checkpoint_dir, config)
    if setting.processes.is_main:
        entry["init_from"] = setting.remembered["init_from"]
        folder.append(entry)
        save(setting, state, folder, [BEST, LATEST])
        log.add(entry)


# --- What the main process saves and prints ---


def open_folder(setting: Setting, state: TrainState) -> tuple[RunFolder, Log]:
    """The run's folder, with a first checkpoint so that a bad disk is found now, and its log."""
    arguments, processes = setting.arguments, setting.processes
    config, folder = arguments.training, RunFolder(arguments.checkpoint_dir)
    settings, run_id = {**vars(arguments.gpt), **vars(config)}, setting.remembered["run_id"]
    metrics = folder.open(state.step)
    track = start_tracker(arguments.tracker, settings, run_id, folder.directory)
    done = state.step == config.max_steps  # but killed before FINAL was written
    save(setting, state, folder, [FINAL, LATEST] if done else [LATEST])
    folder.wait()
    batches, where = setting.batches, machine.describe(setting.device, setting.dtype)
    epochs = config.max_steps / batches.steps_per_epoch
    print(
        f"{state.model.num_parameters():,} parameters on {processes.world_size} × "
        f"{where}; {len(batches.tokens):,} train tokens, "
        f"{batches.tokens_per_step:,} a step, {epochs:.1f} epochs"
    )
    flops = state.model.flops_per_token() / processes.world_size
    speed = (flops, setting.device, setting.dtype)
    return folder, Log(metrics, state.step, config.max_steps, folder.directory, track, *speed)


def save(setting: Setting, state: TrainState, folder: RunFolder, names: list[str]) -> None:
    """Saves the weights as each of `names`, and as StoryGPT_latest.pt all that resuming needs."""
    state.saved_step = state.step
    weights = state.weights(setting.arguments.gpt, setting.arguments.training)
    weights["init_from"] = setting.remembered["init_from"]
    folder.save(names, weights, state.rest() | setting.remembered)


if __name__ == "__main__":
    cli.run(main)
