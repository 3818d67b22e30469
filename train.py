"""Script: the training loop, from prepared data to the best checkpoint.

Read `main` top to bottom. One process, or as many as `torchrun` starts. Nothing random is kept
between steps: the batch of a step and its dropout are functions of (seed, step, micro-batch), so a
resumed run is the run it resumes, and N processes do what one would.
"""

import argparse
import io
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from config import PRESETS, GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt.checkpoint import (
    BEST,
    FINAL,
    LATEST,
    load_checkpoint,
    load_training_state,
    load_weights,
    save_checkpoint,
    training_state,
    write_atomically,
)
from storygpt.cli import parse_flags, progress_bar, run
from storygpt.device import peak_flops, pick_device, pick_dtype
from storygpt.token_files import (
    data_fingerprint,
    load_meta,
    load_tokens,
    story_starts,
    training_batch,
    validation_starts,
    windows,
)
from storygpt.tokenizer import load_tokenizer

# Fields that may differ when a run is resumed: they change when and where, not what.
FREE_FIELDS = ("device", "compile", "save_interval")


@dataclass(frozen=True)
class Arguments:
    """Train a GPT on prepared data. With torchrun, on several processes."""

    gpt: tyro.conf.FlagConversionOff[GPTConfig] = field(default_factory=GPTConfig)
    training: tyro.conf.FlagConversionOff[TrainingConfig] = field(default_factory=TrainingConfig)
    preset: Literal["storygpt", "demo"] = "storygpt"
    """Where the defaults of all other fields come from: the 57M reference, or a small model."""
    data_dir: Path = Path("data")
    """Folder that prepare_data.py wrote."""
    checkpoint_dir: Path = Path("checkpoints")
    """Folder for checkpoints, metrics.jsonl and loss_plot.png."""
    resume: bool = False
    """Continue the run in checkpoint_dir; flags left out are taken from it."""


def parse_arguments() -> tuple[Arguments, dict | None]:
    """The command line, and the checkpoint to resume from (None for a new run).

    A first look finds what the defaults of all other flags depend on. Raises InputError.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")  # without a value, the second look complains
    first.add_argument("--resume", action="store_true")
    first.add_argument("--checkpoint_dir", "--checkpoint-dir", nargs="?", type=Path)
    known, _ = first.parse_known_args()
    directory = known.checkpoint_dir or Arguments.checkpoint_dir
    # torchrun starts its workers anew, with the same command line, when one of them has died.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    latest = directory / LATEST

    checkpoint = None
    if {"-h", "--help"}.isdisjoint(sys.argv) and (known.resume or (restarted and latest.exists())):
        if not latest.exists():
            raise InputError(f"nothing to resume in {directory}: start without --resume")
        checkpoint = load_checkpoint(latest)
    gpt, training = PRESETS.get(known.preset, PRESETS["storygpt"])
    if checkpoint and not known.preset:
        gpt, training = checkpoint["gpt_config"], checkpoint["training_config"]
    defaults = Arguments(gpt, training, checkpoint_dir=directory)
    arguments = parse_flags(Arguments, defaults)
    if checkpoint is None:
        held = [name for name in (LATEST, BEST, FINAL) if (directory / name).exists()]
        if held:
            raise InputError(
                f"{directory} already holds a run ({held[0]}): continue it with --resume, or pass "
                "another --checkpoint_dir"
            )
    else:
        check_same_run(checkpoint, arguments)
    return arguments, checkpoint


def check_same_run(checkpoint: dict, arguments: Arguments) -> None:
    """Raises InputError with every setting in which `arguments` would change a resumed run."""
    before = asdict(checkpoint["gpt_config"]) | asdict(checkpoint["training_config"])
    now = asdict(arguments.gpt) | asdict(arguments.training)
    differences = [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in before
        if name not in FREE_FIELDS and before[name] != now[name]
    ]
    if differences:
        raise InputError(
            f"--resume would change the run in {arguments.checkpoint_dir}: "
            f"{'; '.join(differences)}. Leave those flags out, or pass another --checkpoint_dir "
            "without --resume"
        )


def build_optimizers(model: GPT, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Fused AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101) for all weights; with
    `optimizer="muon"`, Muon (Jordan et al., 2024) for the blocks' matrices and AdamW for the rest.

    Muon's updates are scaled to AdamW's root mean square (Liu et al., 2025, arXiv:2502.16982), so
    that both follow the same learning rate.
    """
    groups, muon = model.parameter_groups(config.weight_decay), []
    if config.optimizer == "muon":
        matrices = groups.pop(0)
        muon = [torch.optim.Muon([matrices], config.learning_rate, adjust_lr_fn="match_rms_adamw")]
    betas = (config.beta1, config.beta2)
    return [torch.optim.AdamW(groups, config.learning_rate, betas, fused=True), *muon]


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> LRScheduler:
    """Linear warm-up, then a cosine to min_lr at max_steps."""
    cosine = CosineAnnealingLR(
        optimizer, T_max=config.max_steps - config.warmup_steps, eta_min=config.min_lr
    )
    if config.warmup_steps == 0:
        return cosine
    warmup = LinearLR(optimizer, start_factor=0.001, total_iters=config.warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[config.warmup_steps])


@torch.no_grad()
def estimate_loss(
    model: nn.Module, tokens: np.ndarray, config: TrainingConfig, context_length: int, precision
) -> float:
    """Mean loss in nats a token over fixed windows of the validation split.

    The same windows every time; under torchrun each process takes its share of them.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    starts = validation_starts(tokens, context_length, config.eval_iters * config.batch_size)
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, windows
    model.eval()
    for first in range(rank * config.batch_size, len(starts), world_size * config.batch_size):
        rows = windows(tokens, starts[first : first + config.batch_size], context_length)
        x, y = map(torch.from_numpy, rows)
        with precision:
            _, loss = model(x.to(device), y.to(device))
        total += torch.tensor([loss.item() * len(x), len(x)], dtype=torch.float64)
    model.train()
    if dist.is_initialized():
        total = total.to(device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def ahead(items: Iterator) -> Iterator:
    """`items`, each made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items)
        while True:
            item = future.result()
            future = thread.submit(next, items)
            yield item


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of all random numbers of one micro-batch."""
    return int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0])


def tell_sample(model: GPT, vocab_size: int, seed: int) -> str:
    """The first 60 tokens of a story, told from nothing."""
    tokenizer = load_tokenizer(vocab_size)
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    start = torch.full((1, 1), tokenizer.eot_token, device=model.wte.weight.device)
    ids = model.generate(
        start, 60, temperature=0.8, top_k=100, end_of_text=start.item(), generator=generator
    )
    told = [token for token in ids[0].tolist() if token != tokenizer.eot_token]
    return " ".join(tokenizer.decode(told).split())


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl up to `last_step`; the file is cut to them."""
    metrics = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                metrics.append(json.loads(line))
            except ValueError:  # a power cut can leave half a line
                break
    metrics = [line for line in metrics if line["step"] <= last_step]
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    write_atomically(path, lambda file: file.write(text.encode()))
    return metrics


def draw_loss_plot(metrics: list[dict], path: Path) -> None:
    """Draws train and validation loss over tokens seen, the best validation loss marked."""
    from matplotlib.figure import Figure

    tokens = np.array([line["tokens"] for line in metrics]) / 1e6
    train_loss = np.array([line["train_loss"] for line in metrics])
    validated = [line for line in metrics if "val_loss" in line]
    if not validated:
        return
    val_tokens = np.array([line["tokens"] for line in validated]) / 1e6
    val_loss = np.array([line["val_loss"] for line in validated])
    best = val_loss.argmin()
    width = max(1, len(train_loss) // 50)  # a running mean over the last 2 % of the steps
    sums = np.concatenate(([0.0], train_loss.cumsum()))
    index = np.arange(1, len(sums))
    smooth = (sums[index] - sums[np.maximum(0, index - width)]) / np.minimum(index, width)

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, train_loss, color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot(tokens, smooth, color="tab:blue", label="train")
    axes.plot(val_tokens, val_loss, color="tab:orange", marker=".", label="validation")
    label = f"best validation {val_loss[best]:.3f} at step {validated[best]['step']:,}"
    axes.plot(val_tokens[best], val_loss[best], "*", color="tab:red", markersize=14, label=label)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a token)", title="StoryGPT")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(image.getvalue()))


def main() -> None:
    arguments, resumed = parse_arguments()
    gpt_config, config = arguments.gpt, arguments.training
    directory = arguments.checkpoint_dir

    # Processes: rank 0 alone writes and prints.
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if config.gradient_accumulation_steps % world_size:
        raise InputError(
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} does not divide "
            f"among {world_size} processes: pass a multiple of {world_size}"
        )
    device = pick_device(config.device)
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        # While a process waits for the others, a handler in Python would not get its turn.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives a restart: the addresses in it are of dead workers.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    master = rank == 0

    # Data
    meta = load_meta(arguments.data_dir, gpt_config.vocab_size)
    if resumed and resumed.get("data_sha256") != data_fingerprint(meta):
        raise InputError(
            f"the data in {arguments.data_dir} is not what the run in {directory} was trained on: "
            "pass its --data_dir"
        )
    context_length = gpt_config.context_length
    train_tokens, val_tokens = (
        load_tokens(arguments.data_dir, split, meta, context_length)
        for split in ("train", "validation")
    )
    stories = story_starts(train_tokens, meta["end_of_text"]) if config.story_windows else None

    # Model, optimizer, schedule
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    dtype = pick_dtype(config.dtype, device)
    precision = nullcontext()
    if dtype != torch.float32:
        precision = torch.autocast(device.type, dtype)
    model = GPT(gpt_config).to(device)
    if resumed:
        load_weights(model, resumed["model_state_dict"], directory / LATEST)
    optimizers = build_optimizers(model, config)
    schedules = [build_schedule(optimizer, config) for optimizer in optimizers]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    compile_model = config.compile if config.compile is not None else device.type == "cuda"
    compiled = torch.compile(model) if compile_model else model
    wrapped = compiled
    if dist.is_initialized():
        devices = [local_rank] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(compiled, device_ids=devices)

    step, val_loss, best_val_loss, skipped_steps = 0, math.inf, math.inf, 0
    if resumed:
        load_training_state(resumed, optimizers, schedules, scaler, directory / LATEST)
        step, val_loss = resumed["step"], resumed["val_loss"]
        best_val_loss, skipped_steps = resumed["best_val_loss"], resumed["skipped_steps"]
        del resumed

    def weights() -> dict:
        return {
            "gpt_config": gpt_config,
            "training_config": config,
            "model_state_dict": model.state_dict(),
            "step": step,
            "val_loss": val_loss,
        }

    def save_weights(name: str) -> None:
        save_checkpoint(directory / name, weights())

    def save_latest() -> None:
        with open(metrics_path, "rb") as file:  # a checkpoint never outlives its steps' metrics
            os.fsync(file.fileno())
        state = {
            "best_val_loss": best_val_loss,
            "skipped_steps": skipped_steps,
            "data_sha256": data_fingerprint(meta),
        }
        state |= training_state(optimizers, schedules, scaler)
        save_checkpoint(directory / LATEST, weights() | state)

    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * context_length
    metrics, metrics_path = [], directory / "metrics.jsonl"
    if master:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.tmp"):  # of a process killed while it was saving
            leftover.unlink()
        metrics = read_metrics(metrics_path, step)
        save_latest()  # a folder that cannot hold checkpoints fails now, not in an hour
        print(
            f"{model.num_parameters():,} parameters on {world_size} × {device.type}, "
            f"{str(dtype)[6:]}; {len(train_tokens):,} train tokens, {tokens_per_step:,} a step, "
            f"{config.max_steps * tokens_per_step / len(train_tokens):.1f} epochs"
        )

    # Signals ask the loop to stop after its step; the same signal again ends the process at once.
    received = []

    def request_stop(number, frame) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)

    own_micro_batches = config.gradient_accumulation_steps // world_size
    own = range(rank * own_micro_batches, (rank + 1) * own_micro_batches)

    def micro_batches(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's inputs and targets from `step` on, without end."""
        for s in itertools.count(step):
            for i in own:
                positions = range(i * config.batch_size, (i + 1) * config.batch_size)
                batch = training_batch(
                    train_tokens,
                    config.seed,
                    s,
                    positions,
                    context_length,
                    stories,
                    config.story_windows,
                )
                x, y = map(torch.from_numpy, batch)
                # from pinned memory the copy to the GPU does not wait for the GPU's work
                yield (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    batches = ahead(micro_batches(step + 1))
    peak = peak_flops(device) if dtype != torch.float32 else None
    model.train()
    stop = False
    options = {"total": config.max_steps, "initial": step, "unit": "step"}
    with progress_bar(**options, disable=not master) as bar:
        while step < config.max_steps and not stop:
            step += 1
            start = time.perf_counter()
            loss_sum = torch.zeros((), device=device)
            for micro_batch in own:
                x, y = (part.to(device, non_blocking=True) for part in next(batches))
                if dist.is_initialized():  # gradients are summed over processes once a step
                    wrapped.require_backward_grad_sync = micro_batch == own[-1]
                torch.manual_seed(dropout_seed(config.seed, step, micro_batch))
                with precision:
                    _, loss = wrapped(x, y)
                scaler.scale(loss / own_micro_batches).backward()
                loss_sum += loss.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            # float16 overflowed: no optimizer steps, also where its own gradients are finite
            skipped = scaler.is_enabled() and not grad_norm.isfinite()
            for optimizer in optimizers:
                if not skipped:
                    scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()

            # The one host-device synchronization of a step.
            report = torch.stack(
                (loss_sum / own_micro_batches, grad_norm, torch.full_like(loss_sum, len(received)))
            )
            if dist.is_initialized():
                dist.all_reduce(report)
                report[:2] /= world_size
            train_loss, grad_norm, stops = report.tolist()
            stop = stops > 0  # all processes stop after the same step
            learning_rate = schedules[0].get_last_lr()[0]
            skipped_steps += skipped
            for schedule in schedules:
                if not skipped:
                    schedule.step()
            # A healthy scale settles far above this; below it every step is being skipped.
            collapsed = scaler.is_enabled() and scaler.get_scale() < 2**-14
            finite = math.isfinite(train_loss) and (math.isfinite(grad_norm) or skipped)
            if not finite or collapsed:
                raise InputError(
                    f"step {step} has a loss of {train_loss} and a gradient norm of {grad_norm}; "
                    f"the last good checkpoint is {directory / LATEST}. Likely causes: too high a "
                    f"--learning_rate ({config.learning_rate}), too few --warmup_steps "
                    f"({config.warmup_steps}), or --dtype float16 (try bfloat16 or float32)"
                )

            seconds = time.perf_counter() - start
            tokens_per_second = tokens_per_step / seconds
            line = {
                "step": step,
                "tokens": step * tokens_per_step,
                "train_loss": train_loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": round(tokens_per_second, 1),
            }
            if scaler.is_enabled():
                line["skipped_steps"] = skipped_steps
            evaluated = step % config.eval_interval == 0 or step == config.max_steps
            if evaluated:
                val_loss = estimate_loss(compiled, val_tokens, config, context_length, precision)
                line["val_loss"] = val_loss
            if not master:
                continue

            metrics.append(line)
            with open(metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = {"loss": f"{train_loss:.3f}", "tokens/s": f"{tokens_per_second:,.0f}"}
            if peak:
                flops = model.flops_per_token() * tokens_per_second
                shown["MFU"] = f"{flops / (peak * world_size):.1%}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if evaluated:
                bar.write(f"step {step:,}: train loss {train_loss:.4f}, val_loss {val_loss:.4f}")
                bar.write(f"    {tell_sample(model, gpt_config.vocab_size, config.seed)}")
                if val_loss < best_val_loss:
                    best_val_loss = val_loss
                    save_weights(BEST)
                draw_loss_plot(metrics, directory / "loss_plot.png")
            if evaluated or stop or step % config.save_interval == 0:
                save_latest()
    if dist.is_initialized():
        dist.destroy_process_group()

    if stop:
        if master:
            print(
                f"stopped after step {step}; continue with: python train.py --resume "
                f"--data_dir {arguments.data_dir} --checkpoint_dir {directory}"
            )
        sys.exit(128 + (received[0] if received else signal.SIGTERM))
    if master:
        save_weights(FINAL)
        print(
            f"done: best val_loss {best_val_loss:.4f} in {directory / BEST}, the last step in "
            f"{directory / FINAL}, the curves in {directory / 'loss_plot.png'}"
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
    run(main)
