"""Script: the training loop, from prepared data to the best checkpoint.

`train` is the loop and `train_step` one update; how a run is found and set up stands below them.
One process, or as many as `torchrun` starts. Nothing random is kept between steps: the batch of a
step is a function of (seed, step, window), so N processes train on what one would, and dropout one
of (seed, step, micro-batch), so that a resumed run is the run it resumes.
"""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import math
import secrets
import signal
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch import nn

from config import MAY_CHANGE, GPTConfig, InputError, PresetName, TrainingConfig, preset
from model import GPT
from storygpt import device as machine
from storygpt.batches import Batches, mixed_seed, validation_starts
from storygpt.checkpoint import Start, fit_start, load_start, load_weights
from storygpt.distributed import Processes, Stop, lost_a_process
from storygpt.files import BEST, FINAL, LATEST, META, step_name
from storygpt.kernels import compile_model, failed_to_compile, speed_up_training
from storygpt.log import Log, Tracker, start_tracker, words_when_done
from storygpt.losses import estimate_loss
from storygpt.optimizer import Optimizer
from storygpt.record import begin_record, fingerprint_of, origin_of
from storygpt.run_folder import RunFolder, goes_on
from storygpt.state import RunFacts, TrainState
from storygpt.token_files import SPLITS, data_fingerprint, load_meta, load_tokens

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
    """Save and end in time for these hours; exit status 75 (under torchrun 0) says that --resume
    has more to do."""
    tracker: Tracker = "none"
    """Where to send the metrics too."""


@dataclass(frozen=True)
class Run:
    """What stays as it is while training."""

    arguments: Arguments
    processes: Processes
    folder: RunFolder | None
    """The main process's, which has locked it; the others write nothing."""
    device: torch.device
    dtype: torch.dtype
    batches: Batches
    val_tokens: np.ndarray
    facts: RunFacts


class Plan(NamedTuple):
    """What a run begins with."""

    arguments: Arguments
    latest: dict | None
    """The StoryGPT_latest.pt to resume from, if any."""
    start: Start | None
    """What --init_from names, if it was passed."""


def main() -> None:
    cli.never_stop_for_output()  # a closed pipe or a full disk costs what is printed, not the run
    first, _ = cli.parse_flags(FirstFlags, return_unknown_args=True, add_help=False)
    processes = Processes()
    folder = RunFolder(first.checkpoint_dir) if processes.is_main else None
    training = micro_batch = None
    try:
        plan = find_run(first, processes, folder)
        if processes.exchange(has_nothing_left(plan))[0]:
            if folder:
                best = plan.latest["best_val_loss"]
                print(words_when_done(folder.directory, best, "no step was left"))
            processes.see_off()
            return
        training = plan.arguments.training
        run, state = set_up(plan, processes, folder)
        micro_batch = run.facts.micro_batch
        del plan  # a copy of all that was resumed from
        status = train(run, state)
    except Exception as error:
        if failed_to_compile(error):  # first: a compiler's output may hold any word
            reason = cli.one_line(error)
            raise InputError(f"torch.compile failed ({reason}): pass --compile False") from error
        if training and cli.is_out_of_memory(error):
            raise cli.advice_on_memory(training, micro_batch) from error
        if lost_a_process(error):
            raise InputError(
                "lost another process of this run; what ended it is in that one's output"
            ) from error
        raise
    finally:
        if folder:
            folder.close()
    processes.leave()
    sys.exit(status)


# --- The loop ---


def train(run: Run, state: TrainState) -> int:
    """Trains to the last step, or until there is a reason to stop; returns the exit status."""
    arguments, processes, folder = run.arguments, run.processes, run.folder
    training, directory = arguments.training, arguments.checkpoint_dir
    compiled = compile_model(state.model, training.compile, run.device)
    model = processes.wrap(compiled, run.device)
    signals = cli.listen_for_signals(processes.launched)
    log = begin(run, state) if processes.is_main else None
    if run.facts.record["init_from"] and state.step == 0:
        evaluate_start(run, state, compiled, log)

    starts = validation_starts(
        run.val_tokens, arguments.gpt.context_length, most=training.eval_windows
    )
    deadline = cli.STARTED + 3600 * (arguments.max_hours or math.inf)
    pace = Pace(training, eval_windows=len(starts), deadline=deadline)
    last_save = time.monotonic()
    stop = None
    with log or nullcontext():
        while state.step < training.max_steps and not stop:
            # --- One step ---
            began = time.monotonic()
            # A reason to stop goes to all processes with this step, which is still made.
            if signals.stop:
                stop = "signal"
            elif processes.is_main and not pace.allows_two(state.step, folder.save_seconds):
                stop = "time"  # there is none for another step after this one
            entry, stop = train_step(run, state, model, stop)
            seconds = max(time.monotonic() - began, 1e-3)  # Windows' clock may not have moved
            entry["tokens_per_second"] = round(run.batches.tokens_per_step / seconds, 1)
            state.stop_if_diverged(entry, directory, training)

            # --- Evaluate ---
            evaluated = is_evaluated(state.step, training)
            if evaluated:
                state.val_loss = validate(run, compiled, training.eval_windows)
                entry["val_loss"] = state.val_loss
                state.stop_if_diverged(entry, directory, training)
            if not processes.is_main:
                continue

            # --- Save ---
            if evaluated:
                log.add_sample(entry, state.model, training.seed)
            folder.append(entry)
            names = names_due(state, training)
            folder.keep_up()
            failing = folder.failing_for(training.save_minutes)
            late = began - last_save >= 60 * training.save_minutes
            if names or stop or signals.save or failing or late:
                if not evaluated:  # train_loss is of the weights before this step
                    glance = validate(run, state.model, training.batch_size, alone=True)
                    state.stop_if_diverged(entry | {"val_loss": glance}, directory, training)
                signals.save.clear()
                save(run, state, [*names, LATEST])
                last_save = began
            if failing:  # a last try, after which an error ends the run
                folder.wait()

            # --- Log ---
            log.add(entry)
            pace.steps.append(seconds)
            if evaluated:
                pace.evaluation = time.monotonic() - began - seconds
            if state.step == log.first_step + 20 < training.max_steps:  # the speed has settled
                log.show_left(pace.left(state.step))
        finished = state.step == training.max_steps
        if processes.is_main:
            folder.wait(training.save_minutes if finished else 0)  # what goes on in the background

    if processes.is_main:
        print(last_words(run, state, log))
    if finished:
        return 0
    if stop == "signal":  # this process's, or that of another one
        return 128 + (signals.stop[0] if signals.stop else signal.SIGTERM)
    # torchrun would take another status for a death, and start all processes anew.
    return 0 if processes.launched else MORE_TO_DO


def names_due(state: TrainState, training: TrainingConfig) -> list[str]:
    """Returns the names under which the weights of a step are to be saved beside LATEST, and notes
    where they are the best so far."""
    names = []
    if state.step == training.max_steps:
        names.append(FINAL)
    if state.val_loss < state.best_val_loss:
        state.best_val_loss = state.val_loss
        names.append(BEST)
    if state.step and training.keep_interval and state.step % training.keep_interval == 0:
        names.append(step_name(state.step))
    return names


def is_evaluated(step: int, training: TrainingConfig) -> bool:
    """Tells whether the weights that `step` makes are evaluated."""
    return step == training.max_steps or step % training.eval_interval == 0


def train_step(
    run: Run, state: TrainState, model: nn.Module, stop: Stop | None
) -> tuple[dict, Stop | None]:
    """Makes one optimizer update; returns its line of metrics.jsonl, and whether any process stops
    after it, given whether this one does.

    `model` is state.model, perhaps compiled and wrapped.
    """
    training, processes, device = run.arguments.training, run.processes, run.device
    own, size = processes.own_windows(run.batches.windows_per_step), run.facts.micro_batch
    state.step, state.val_loss = state.step + 1, math.inf  # what was measured is of older weights
    train_loss = torch.zeros((), device=device)
    for first in range(own.start, own.stop, size):
        micro_batch = range(first, min(first + size, own.stop))
        x, y = run.batches(state.step, micro_batch)
        processes.average_next_backward(model, micro_batch.stop == own.stop)
        torch.manual_seed(mixed_seed(training.seed, state.step, first))  # of dropout
        with machine.autocast(device, run.dtype):
            _, loss = model(machine.to_device(x, device), machine.to_device(y, device))
        loss = loss * (len(micro_batch) / len(own))  # DDP averages over processes
        state.optimizer.backward(loss)
        train_loss += loss.detach()
    learning_rate = state.optimizer.learning_rate
    grad_norm, skipped = state.optimizer.step()  # clips and moves the schedule on, too
    state.skipped_steps += skipped
    (train_loss, grad_norm), stop = processes.agree([train_loss, grad_norm], stop)
    entry = {
        "step": state.step,
        "tokens": state.step * run.batches.tokens_per_step,
        "epoch": round(state.step / run.batches.steps_per_epoch, 4),
        "train_loss": train_loss,
        "learning_rate": learning_rate,
        "grad_norm": None if skipped else grad_norm,
    }
    if run.dtype == torch.float16:  # steps that overflow are skipped
        entry["skipped_steps"] = state.skipped_steps
    return entry, stop


def validate(run: Run, model: nn.Module, num_windows: int, alone: bool = False) -> float:
    """Returns the mean loss in nats a token over `num_windows` of the validation split.

    The processes share them, unless this one validates `alone`.
    """
    return estimate_loss(
        model,
        run.val_tokens,
        batch_size=run.facts.micro_batch,
        num_windows=num_windows,
        dtype=run.dtype,
        processes=None if alone else run.processes,
    )


def evaluate_start(run: Run, state: TrainState, model: nn.Module, log: Log | None) -> None:
    """Evaluates step 0 of a run that starts from another's weights: what they know of this data."""
    training = run.arguments.training
    loss = validate(run, model, training.eval_windows)
    state.val_loss = state.best_val_loss = loss
    entry = {"step": 0, "tokens": 0, "epoch": 0.0, "val_loss": loss}
    state.stop_if_diverged(entry, run.arguments.checkpoint_dir, training)
    if run.processes.is_main:
        entry["init_from"] = run.facts.record["init_from"]
        run.folder.append(entry)
        save(run, state, [BEST, LATEST])
        run.folder.wait()  # no step has shown yet how much memory it leaves
        log.add(entry)


# --- What the main process saves and prints ---


def begin(run: Run, state: TrainState) -> Log:
    """Saves a first checkpoint, so that a bad disk is found now, and says what the run will be."""
    arguments, folder = run.arguments, run.folder
    training, directory = arguments.training, arguments.checkpoint_dir
    metrics = folder.cut(state.step)
    track = start_tracker(
        arguments.tracker,
        settings=asdict(arguments.gpt) | asdict(training),
        run_id=run.facts.run_id,
        directory=directory,
    )
    if state.step and state.best_val_loss < math.inf and not (directory / BEST).exists():
        cli.warn(f"{directory / BEST} is gone: the best step from here on is saved as that")
        state.best_val_loss = math.inf
    save(run, state, [*names_due(state, training), LATEST])  # also what somebody has removed
    folder.wait()
    print(banner(run, state.model))
    return Log(
        metrics=metrics,
        step=state.step,
        max_steps=training.max_steps,
        directory=directory,
        track=track,
        flops=state.model.flops_per_token() / run.processes.world_size,
        device=run.device,
        dtype=run.dtype,
    )


def last_words(run: Run, state: TrainState, log: Log) -> str:
    """Says what the run has left, or how it goes on, from whatever folder."""
    arguments = run.arguments
    if state.step == arguments.training.max_steps:
        return words_when_done(arguments.checkpoint_dir, state.best_val_loss, log.speed())
    flags = {name: getattr(arguments, name).resolve() for name in ("data_dir", "checkpoint_dir")}
    if arguments.tracker != "none":
        flags["tracker"] = arguments.tracker
    script = str(Path(__file__).resolve())
    command = cli.command_line(script, run.processes.launcher, resume=True, **flags)
    return f"stopped after step {state.step:,} ({log.speed()}); continue with: {command}"


def banner(run: Run, model: GPT) -> str:
    """Says in a line what is trained, where, and on how much."""
    batches, processes = run.batches, run.processes
    training, size = run.arguments.training, run.facts.micro_batch
    epochs, cut = training.max_steps / batches.steps_per_epoch, ""
    if size < (most := largest_micro_batch(training, processes)):
        cut = f"; {size} of {most} windows at a time, which is what fits"
    return (
        f"{model.num_parameters():,} parameters on {processes.world_size} × "
        f"{machine.describe(run.device, run.dtype)}; {len(batches.tokens):,} train tokens, "
        f"{batches.tokens_per_step:,} a step, {epochs:.1f} epochs{cut}"
    )


def save(run: Run, state: TrainState, names: list[str]) -> None:
    """Saves the weights as each of `names`, and as StoryGPT_latest.pt all that resuming needs."""
    state.saved_step = state.step
    checkpoint = state.checkpoint(run.arguments.training, run.facts)
    run.folder.save(names, checkpoint, state.resume_state(run.facts))


class Pace:
    """How long steps take, and evaluations with what comes with them: by the latest ones."""

    def __init__(self, training: TrainingConfig, eval_windows: int, deadline: float):
        """`eval_windows` are those that an evaluation has, `deadline` is of time.monotonic()."""
        so_far = time.monotonic() - cli.STARTED  # run up stands in for the first steps
        self.training, self.deadline = training, deadline
        self.steps = deque([so_far, so_far], maxlen=10)
        """Seconds of the latest steps."""
        self.evaluation: float | None = None
        """Seconds of the last evaluation, if there was one."""
        # A step is three times the work of a forward pass.
        self.evaluation_in_steps = eval_windows / training.windows_per_step / 3

    def seconds(self, steps: range, each: float) -> float:
        """Returns the seconds of `steps`, which take `each`, with their evaluations."""
        guess = each * self.evaluation_in_steps
        evaluation = guess if self.evaluation is None else self.evaluation
        return len(steps) * each + evaluation * sum(is_evaluated(n, self.training) for n in steps)

    def allows_two(self, step: int, save_seconds: float) -> bool:
        """Tells whether the two steps after `step`, their evaluations and a save will be done in
        time."""
        slow = sorted(self.steps)[-2]  # one that compiles, or in which a laptop slept, is no guide
        seconds = self.seconds(range(step + 1, step + 3), each=slow) + save_seconds
        return time.monotonic() + seconds <= self.deadline

    def left(self, step: int) -> float:
        """Returns the seconds of all steps after `step`."""
        each = sum(self.steps) / len(self.steps)
        return self.seconds(range(step + 1, self.training.max_steps + 1), each)


# --- Run up ---


def find_run(first: FirstFlags, processes: Processes, folder: RunFolder | None) -> Plan:
    """Finds out what to train: what the command line says, and the run that it resumes.

    Raises InputError where a run would be overwritten or changed.
    """
    start, latest = load_start(first.init_from) if first.init_from else None, None
    if not first.resume:  # mistakes come before anything is made or waited for
        parse_arguments(first, processes, start, settings=None)
    resume = any(processes.exchange(first.resume))
    restarted = any(processes.exchange(processes.restarted))
    processes.compare_torch()
    with processes.together():
        if folder:
            folder.lock()
            latest = folder.find(resume or restarted)
    # What torchrun starts anew was perhaps refused before: it goes on with no run but its own.
    kept = latest and resume and [vars(latest["gpt_config"]), vars(latest["training_config"])]
    settings = processes.exchange(kept)[0]
    with processes.together() as same:
        arguments = parse_arguments(first, processes, start, settings)
        origin = start.origin if start else None
        if latest and not goes_on(latest, arguments.gpt, arguments.training, origin):
            latest = folder.find(resume=False)  # None, or what would be lost is named
        numbers = asdict(arguments.gpt) | asdict(arguments.training)
        same |= {name: value for name, value in numbers.items() if name not in MAY_CHANGE}
        same["init_from"] = origin and origin["sha256"][:12]
    if (resume or restarted) and processes.is_main:
        print(resumption(latest))
    return Plan(arguments, latest, start)


def parse_arguments(
    first: FirstFlags, processes: Processes, start: Start | None, settings: list[dict] | None
) -> Arguments:
    """Parses all flags; what they leave out is as in the `settings` of the run that goes on, or of
    the preset. Raises InputError with what cannot be had here."""
    gpt, training = preset(first.preset or "storygpt")
    if settings and not first.preset:
        gpt, training = GPTConfig(**settings[0]), TrainingConfig(**settings[1])
    elif start:
        gpt = start.config
    defaults = Arguments(checkpoint_dir=first.checkpoint_dir, gpt=gpt, training=training)
    arguments = cli.parse_flags(Arguments, defaults)
    if arguments.max_hours is not None and not 0 < arguments.max_hours < math.inf:
        raise InputError(f"max_hours must be above 0, not {arguments.max_hours}")
    training = arguments.training.filled_in(arguments.gpt.n_embd)
    processes.own_windows(training.windows_per_step)  # both for what they raise
    machine.use_device(training.device)
    return replace(arguments, training=training)


def has_nothing_left(plan: Plan) -> bool:
    """Tells whether a run needs no more data than there is: it is finished, and has none here."""
    arguments, latest = plan.arguments, plan.latest
    if not latest or latest["step"] < arguments.training.max_steps:
        return False
    whole = all((arguments.checkpoint_dir / name).exists() for name in (BEST, FINAL))
    return whole and not (arguments.data_dir / META).exists()


def resumption(latest: dict | None) -> str:
    """Says what --resume has found."""
    if not latest:
        return "starting a new run"
    if latest["step"] == 0:
        return "beginning again with the settings of this run, which had not come to save a step"
    return f"resuming after step {latest['step']:,}"


def set_up(plan: Plan, processes: Processes, folder: RunFolder | None) -> tuple[Run, TrainState]:
    """Makes what a new or a resumed run trains with. Raises InputError."""
    arguments, latest, start = plan
    gpt, training = arguments.gpt, arguments.training
    with processes.together() as same:
        device = processes.own_device(machine.use_device(training.device))
        dtype = machine.pick_dtype(training.dtype, device)
        torch.set_float32_matmul_precision("high")  # TF32, where a run in float32 is on CUDA
        machine.check_fits(gpt, training.batch_size, device)
        start_weights = fit_start(start, gpt) if start else None
        meta, train_tokens, val_tokens = load_data(arguments, latest, processes.local_rank == 0)
        precision = machine.dtype_name(dtype)
        same |= {"data": data_fingerprint(meta)[:12], "device": device.type, "dtype": precision}
    processes.meet(device)
    latest = processes.from_main(latest, device)
    batches = Batches(
        tokens=train_tokens,
        end_of_text=meta["end_of_text"],
        seed=training.seed,
        windows_per_step=training.windows_per_step,
        context_length=gpt.context_length,
        story_windows=training.story_windows,
    )

    torch.manual_seed(training.seed)
    model = GPT(gpt).to(device)
    speed_up_training(model, device)
    state = TrainState(model, Optimizer(model, training, device, dtype))
    if latest:
        state.load(latest, arguments.checkpoint_dir / LATEST)
    elif start:
        load_weights(model, start_weights, arguments.init_from)
    card = machine.card_name(device)
    most = largest_micro_batch(training, processes)
    was = latest["training_config"].batch_size if latest else None
    if was == training.batch_size and latest.get("card") == card:  # the same dropout again
        most = math.gcd(most, latest["micro_batch"])
    # What a first step makes: AdamW's two averages of each weight, and a copy for other processes.
    later = (0 if state.step else 2) + processes.launched
    micro_batch = machine.fit_micro_batch(
        model, most, dtype=dtype, spare=4 * later * model.num_parameters(), processes=processes
    )
    if latest and latest["dtype"] != precision and processes.is_main:
        print(f"this run was in {latest['dtype']} and goes on in {precision}")
    tracked = arguments.tracker != "none"
    facts = RunFacts(
        record=begin_record(meta, origin_of(latest) if latest else start and start.origin),
        # A run keeps its id also where it goes on without its tracker for a while.
        run_id=(latest or {}).get("run_id") or (secrets.token_hex(4) if tracked else ""),
        dtype=precision,
        card=card,
        micro_batch=micro_batch,
    )
    run = Run(
        arguments=arguments,
        processes=processes,
        folder=folder,
        device=device,
        dtype=dtype,
        batches=batches,
        val_tokens=val_tokens,
        facts=facts,
    )
    return run, state


def load_data(
    arguments: Arguments, latest: dict | None, verify: bool
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Returns what meta.json says, and the tokens of both splits, read whole if to `verify` them.

    Raises InputError where they are not as they should be, or not those of the run so far.
    """
    data_dir, gpt = arguments.data_dir, arguments.gpt
    meta = load_meta(data_dir, gpt.vocab_size, arguments.preset)
    if latest and latest["step"] and fingerprint_of(latest) != data_fingerprint(meta):
        raise InputError(
            f"the data in {data_dir} is not what the run was trained on so far: pass its --data_dir"
        )
    train_tokens, val_tokens = (
        load_tokens(data_dir, split, meta, context_length=gpt.context_length, verify=verify)
        for split in SPLITS
    )
    return meta, train_tokens, val_tokens


def largest_micro_batch(training: TrainingConfig, processes: Processes) -> int:
    """Returns how many windows a process reads at once where there is memory enough."""
    return min(training.batch_size, training.windows_per_step // processes.world_size)


if __name__ == "__main__":
    cli.run(main)
