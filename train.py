"""Script: the training loop, from prepared data to the best checkpoint.

Read `train` top to bottom, then what it calls. One process, or as many as `torchrun` starts.
Nothing random is kept between steps: the batch of a step and its dropout are functions of (seed,
step, micro-batch), so a resumed run is the run it resumes, and N processes do what one would.
"""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import math
import secrets
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch import nn

from config import GPTConfig, InputError, PresetName, TrainingConfig, preset
from model import GPT
from storygpt import device as machine
from storygpt.batches import Batches, mixed_seed
from storygpt.checkpoint import Start, fit_start, load_start, load_weights
from storygpt.distributed import Processes, Stop, lost_a_process
from storygpt.files import BEST, FINAL, LATEST, step_name
from storygpt.kernels import speed_up_training
from storygpt.log import Log, Tracker, start_tracker
from storygpt.losses import estimate_loss
from storygpt.optimizer import Optimizer
from storygpt.run_folder import RunFolder, check_same_data
from storygpt.state import RunFacts, TrainState
from storygpt.token_files import data_fingerprint, load_meta, load_tokens

MORE_TO_DO = 75  # exit status of a run that ended for want of time: EX_TEMPFAIL


@dataclass(frozen=True)
class FirstFlags:
    """What the defaults of all other flags depend on."""

    preset: PresetName | None = None
    """Where all other defaults come from, by size: demo, 3m, 10m, 30m, storygpt (57M, the reference
    and the default), gpt2 (124M); docs/training.md says which for which machine."""
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
    tracker: Tracker = "none"
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
    facts: RunFacts


class Beginning(NamedTuple):
    """What a run begins with."""

    arguments: Arguments
    latest: dict | None
    """The StoryGPT_latest.pt to resume from, if any."""
    start: Start | None
    """What --init_from names, if it was passed."""


def main() -> None:
    cli.never_stop_for_output()  # a closed pipe or a full disk costs what is printed, not the run
    beginning = parse_arguments()
    try:
        setting, state = set_up(beginning)
        status = train(setting, state)
    except Exception as error:
        if cli.is_out_of_memory(error):
            raise cli.advice_on_memory(beginning.arguments.training) from error
        if lost_a_process(error):
            raise InputError(
                "lost another process of this run; what ended it is in that one's output"
            ) from error
        raise
    setting.processes.part()
    sys.exit(status)


# --- Setting up ---


def parse_arguments() -> Beginning:
    """Reads the command line, and what it says to resume or to start from.

    Raises InputError where a run would be overwritten or changed.
    """
    first = cli.parse_first(FirstFlags)
    folder, processes = RunFolder(first.checkpoint_dir), Processes()
    latest = folder.unfinished() if first.resume or processes.restarted else None
    start = load_start(first.init_from) if first.init_from else None
    gpt, training = preset(first.preset or "storygpt")
    if latest and not first.preset:
        gpt, training = latest["gpt_config"], latest["training_config"]
    elif start:
        gpt = start.config
    defaults = Arguments(checkpoint_dir=first.checkpoint_dir, gpt=gpt, training=training)
    arguments = cli.parse_flags(Arguments, defaults)
    training = arguments.training.filled_in(arguments.gpt.n_embd)
    arguments = replace(arguments, training=training)
    if arguments.max_hours is not None and not 0 < arguments.max_hours < math.inf:
        raise InputError(f"max_hours must be above 0, not {arguments.max_hours}")
    if latest:
        origin = start.origin if start else None
        folder.check_same_run(latest, gpt=arguments.gpt, training=training, origin=origin)
    else:
        folder.check_unused()
    if first.resume and processes.is_main:
        print(f"resuming after step {latest['step']:,}" if latest else "starting a new run")
    return Beginning(arguments=arguments, latest=latest, start=start)


def set_up(beginning: Beginning) -> tuple[Setting, TrainState]:
    """Makes what a new or a resumed run trains with. Raises InputError."""
    arguments, latest, start = beginning
    gpt, config = arguments.gpt, arguments.training
    processes = Processes()
    processes.share(config.gradient_accumulation_steps)  # complains before anything is started
    device = processes.meet(machine.use_device(config.device))
    dtype = machine.pick_dtype(config.dtype, device)
    machine.check_fits(gpt, config.batch_size, device)

    start_weights = fit_start(start, gpt) if start else None
    meta = load_meta(arguments.data_dir, gpt.vocab_size)
    if latest:
        check_same_data(latest, data_fingerprint(meta), arguments.data_dir)
    train_tokens, val_tokens = (
        load_tokens(arguments.data_dir, split, meta, gpt.context_length, verify=processes.is_main)
        for split in ("train", "validation")
    )
    batches = Batches(
        tokens=train_tokens,
        end_of_text=meta["end_of_text"],
        seed=config.seed,
        windows_per_step=config.batch_size * config.gradient_accumulation_steps,
        context_length=gpt.context_length,
        story_windows=config.story_windows,
    )

    torch.manual_seed(config.seed)
    model = GPT(gpt).to(device)
    speed_up_training(model, device)
    state = TrainState(model, Optimizer(model, config, device, dtype))
    if latest:
        state.load(latest, arguments.checkpoint_dir / LATEST)
    elif start:
        load_weights(model, start_weights, arguments.init_from)
    facts = gather_facts(beginning, data=data_fingerprint(meta), dtype=machine.dtype_name(dtype))
    setting = Setting(
        arguments=arguments,
        processes=processes,
        device=device,
        dtype=dtype,
        batches=batches,
        val_tokens=val_tokens,
        facts=facts,
    )
    return setting, state


def gather_facts(beginning: Beginning, data: str, dtype: str) -> RunFacts:
    """Returns what a new run will keep for good, or a resumed one has kept."""
    arguments, latest, start = beginning
    new_id = secrets.token_hex(4) if arguments.tracker != "none" else ""
    if not latest:
        origin = start.origin if start else None
        return RunFacts(data=data, dtype=dtype, run_id=new_id, init_from=origin)
    if latest["dtype"] != dtype:
        print(f"this run was in {latest['dtype']} and goes on in {dtype}")
    # A run keeps its id also where it goes on without its tracker for a while.
    run_id, origin = latest.get("run_id") or new_id, latest.get("init_from")
    return RunFacts(data=data, dtype=dtype, run_id=run_id, init_from=origin)


# --- The loop ---


def train(setting: Setting, state: TrainState) -> int:
    """Trains to the last step, or until there is a reason to stop; returns the exit status."""
    arguments, processes = setting.arguments, setting.processes
    config, directory = arguments.training, arguments.checkpoint_dir
    compiled = machine.compile_model(state.model, config.compile, setting.device)
    model = processes.wrap(compiled, setting.device)
    signals = cli.listen_for_signals(processes.launched)
    folder, log = begin(setting, state) if processes.is_main else (None, None)
    if setting.facts.init_from and state.step == 0:
        evaluate_start(setting, state, compiled, folder=folder, log=log)

    deadline = cli.STARTED + 3600 * (arguments.max_hours or math.inf)
    last_save = time.monotonic()
    longest = last_save - cli.STARTED  # seconds of a step: setting up stands in for the first
    stop = None
    with log or nullcontext():
        while state.step < config.max_steps and not stop:
            # --- One step ---
            began = time.monotonic()
            if signals:
                stop = "signal"
            elif processes.is_main and began + 2 * longest > deadline:
                stop = "time"  # there is none for another step after this one
            entry, stop = train_step(setting, state, model, stop)
            speed = setting.batches.tokens_per_step / (time.monotonic() - began)
            entry["tokens_per_second"] = round(speed, 1)
            state.stop_if_diverged(entry, directory, config)

            # --- Evaluate ---
            last = state.step == config.max_steps
            evaluated = last or state.step % config.eval_interval == 0
            if evaluated:
                state.val_loss = entry["val_loss"] = validate(setting, compiled, config.eval_iters)
                state.stop_if_diverged(entry, directory, config)
            if not processes.is_main:
                continue

            # --- Save ---
            if evaluated:
                log.add_sample(entry, state.model, config.seed)
            folder.append(entry)
            names = []
            if last:
                names.append(FINAL)
            if state.val_loss < state.best_val_loss:
                state.best_val_loss = state.val_loss
                names.append(BEST)
            if config.keep_interval and state.step % config.keep_interval == 0:
                names.append(step_name(state.step))
            if names or stop or began - last_save >= 60 * config.save_minutes:
                if not evaluated:
                    check_new_weights(setting, state, entry)
                save(setting, state, folder, [*names, LATEST])
                last_save = began

            # --- Log ---
            log.add(entry)
            longest = max(longest, time.monotonic() - began)
        if processes.is_main:
            folder.wait()  # saving goes on in the background

    finished = state.step == config.max_steps
    if processes.is_main and finished:
        print(log.finished(state.best_val_loss))
    elif processes.is_main:
        print(log.stopped(data_dir=arguments.data_dir, tracker=arguments.tracker))
    if finished:
        return 0
    if stop == "signal":
        return 128 + (signals[0] if signals else signal.SIGTERM)
    # torchrun would take another status for a death, and start all processes anew.
    return 0 if processes.launched else MORE_TO_DO


def train_step(
    setting: Setting, state: TrainState, model: nn.Module, stop: Stop | None
) -> tuple[dict, Stop | None]:
    """Makes one optimizer update; returns its line of metrics.jsonl, and whether any process stops
    after it, given whether this one does.

    `model` is state.model, perhaps compiled and wrapped.
    """
    config, processes, device = setting.arguments.training, setting.processes, setting.device
    own = processes.share(config.gradient_accumulation_steps)
    state.step, state.val_loss = state.step + 1, math.inf  # what was measured is of older weights
    loss_sum = torch.zeros((), device=device)
    for micro_batch in own:
        first = micro_batch * config.batch_size
        x, y = setting.batches(state.step, range(first, first + config.batch_size))
        processes.average_next_backward(model, micro_batch == own[-1])
        torch.manual_seed(mixed_seed(config.seed, state.step, micro_batch))  # of dropout
        with machine.autocast(device, setting.dtype):
            _, loss = model(machine.to_device(x, device), machine.to_device(y, device))
        state.optimizer.backward(loss / len(own))  # DDP averages over processes
        loss_sum += loss.detach()
    learning_rate = state.optimizer.learning_rate
    grad_norm, skipped = state.optimizer.step()  # clips and moves the schedule on, too
    state.skipped_steps += skipped
    (train_loss, grad_norm), stop = processes.agree([loss_sum / len(own), grad_norm], stop)
    entry = {
        "step": state.step,
        "tokens": state.step * setting.batches.tokens_per_step,
        "epoch": round(state.step / setting.batches.steps_per_epoch, 4),
        "train_loss": train_loss,
        "learning_rate": learning_rate,
        "grad_norm": None if skipped else grad_norm,
    }
    if setting.dtype == torch.float16:  # steps that overflow are skipped
        entry["skipped_steps"] = state.skipped_steps
    return entry, stop


def validate(setting: Setting, model: nn.Module, num_batches: int, alone: bool = False) -> float:
    """Returns the mean loss in nats a token over `num_batches` validation batches.

    The processes share them, unless this one validates `alone`.
    """
    return estimate_loss(
        model,
        setting.val_tokens,
        context_length=setting.arguments.gpt.context_length,
        batch_size=setting.arguments.training.batch_size,
        num_batches=num_batches,
        device=setting.device,
        dtype=setting.dtype,
        processes=None if alone else setting.processes,
    )


def check_new_weights(setting: Setting, state: TrainState, entry: dict) -> None:
    """Raises InputError where a step without an evaluation has ruined the weights, before they are
    saved: its train_loss is of those before it."""
    glance = {"val_loss": validate(setting, state.model, num_batches=1, alone=True)}
    arguments = setting.arguments
    state.stop_if_diverged(entry | glance, arguments.checkpoint_dir, arguments.training)


def evaluate_start(
    setting: Setting,
    state: TrainState,
    model: nn.Module,
    folder: RunFolder | None,
    log: Log | None,
) -> None:
    """Evaluates step 0 of a run that starts from another's weights: what they know of this data."""
    config = setting.arguments.training
    loss = validate(setting, model, config.eval_iters)
    state.val_loss = state.best_val_loss = loss
    entry = {"step": 0, "tokens": 0, "epoch": 0.0, "val_loss": loss}
    state.stop_if_diverged(entry, setting.arguments.checkpoint_dir, config)
    if setting.processes.is_main:
        entry["init_from"] = setting.facts.init_from
        folder.append(entry)
        save(setting, state, folder, [BEST, LATEST])
        log.add(entry)


# --- What the main process saves and prints ---


def begin(setting: Setting, state: TrainState) -> tuple[RunFolder, Log]:
    """Locks the run's folder, saves a first checkpoint so that a bad disk is found now, and says
    what the run will be."""
    arguments, directory = setting.arguments, setting.arguments.checkpoint_dir
    config, folder = arguments.training, RunFolder(directory)
    metrics = folder.open(state.step)
    track = start_tracker(
        arguments.tracker,
        settings=asdict(arguments.gpt) | asdict(config),
        run_id=setting.facts.run_id,
        directory=directory,
    )
    done = state.step == config.max_steps  # but killed before FINAL was written
    save(setting, state, folder, [FINAL, LATEST] if done else [LATEST])
    folder.wait()
    print(banner(setting, state.model))
    log = Log(
        metrics=metrics,
        step=state.step,
        max_steps=config.max_steps,
        directory=directory,
        track=track,
        flops=state.model.flops_per_token() / setting.processes.world_size,
        device=setting.device,
        dtype=setting.dtype,
    )
    return folder, log


def banner(setting: Setting, model: GPT) -> str:
    """Says in a line what is trained, where, and on how much."""
    batches, processes = setting.batches, setting.processes
    epochs = setting.arguments.training.max_steps / batches.steps_per_epoch
    return (
        f"{model.num_parameters():,} parameters on {processes.world_size} × "
        f"{machine.describe(setting.device, setting.dtype)}; {len(batches.tokens):,} train tokens, "
        f"{batches.tokens_per_step:,} a step, {epochs:.1f} epochs"
    )


def save(setting: Setting, state: TrainState, folder: RunFolder, names: list[str]) -> None:
    """Saves the weights as each of `names`, and as StoryGPT_latest.pt all that resuming needs."""
    state.saved_step = state.step
    arguments, facts = setting.arguments, setting.facts
    checkpoint = state.checkpoint(arguments.gpt, arguments.training, facts)
    folder.save(names, checkpoint, state.resume_state(facts))


if __name__ == "__main__":
    cli.run(main)
