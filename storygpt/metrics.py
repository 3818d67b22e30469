"""What a run tells about itself: metrics.jsonl, the plot, and a tracker where one is wanted."""

import json
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from config import InputError
from model import GPT
from storygpt.cli import command_line, one_line, progress_bar
from storygpt.device import peak_flops, peak_memory
from storygpt.files import BEST, FINAL, PLOT, save_figure, write_atomically
from storygpt.generation import GenerationSettings, generate_stories


def parse_metrics(text: bytes, path: Path) -> list[dict]:
    """The lines of a metrics.jsonl read from `path`.

    A power cut can leave half of the last line, which does not count. Raises InputError where
    another line is not one that training wrote.
    """
    lines, metrics = text.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            follows = not metrics or entry["step"] == metrics[-1]["step"] + 1
            learned = entry["step"] == 0 or math.isfinite(entry["train_loss"])
            if not (follows and learned and entry["tokens"] >= 0):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break
            raise InputError(
                f"line {number} of {path} is not one that training wrote: mend or remove it, or "
                "move the file away to go on without it"
            ) from error
        metrics.append(entry)
    return metrics


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl up to `last_step`, to which the file is cut.

    Raises InputError, the file untouched, as `parse_metrics` does.
    """
    if not path.exists():
        if last_step > 0:
            print(f"{path} is missing: the curves begin at step {last_step:,}", file=sys.stderr)
        return []
    text = path.read_bytes()
    metrics = [entry for entry in parse_metrics(text, path) if entry["step"] <= last_step]
    kept = "".join(json.dumps(entry) + "\n" for entry in metrics).encode()
    if kept != text:
        write_atomically(path, lambda file: file.write(kept))
    return metrics


def append_metrics(path: Path, entry: dict) -> None:
    """Adds one line of strict JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean that does not lag: over as many values before as after, a fiftieth of all at
    the most and fewer towards both ends."""
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index // 4, len(values) - 1 - index), len(values) // 100)
    sums = np.concatenate(([0.0], values.cumsum()))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def draw_loss_plot(metrics: list[dict], path: Path) -> None:
    """Draws train and validation loss over tokens seen, the best validation loss marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    trained = [entry for entry in metrics if "train_loss" in entry]
    validated = [entry for entry in metrics if "val_loss" in entry]
    if not validated:
        return
    tokens, val_tokens = (
        np.array([entry["tokens"] for entry in entries]) / 1e6 for entries in (trained, validated)
    )
    train_loss = np.array([entry["train_loss"] for entry in trained])
    val_loss = np.array([entry["val_loss"] for entry in validated])
    best = val_loss.argmin()

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, train_loss, color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot(tokens, smoothed(train_loss), color="tab:blue", label="train")
    axes.plot(val_tokens, val_loss, color="tab:orange", marker=".", label="validation")
    label = f"best validation {val_loss[best]:.3f} at step {validated[best]['step']:,}"
    axes.plot(val_tokens[best], val_loss[best], "*", color="tab:red", markersize=14, label=label)
    # On a linear axis the first steps would leave no room for all the others.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a token)", title="StoryGPT")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=120)


def start_tracker(name: str, config: dict, run_id: str, directory: Path) -> Callable[[dict], None]:
    """A callable that sends an entry of metrics.jsonl to `wandb` or `trackio`, or nowhere.

    Both share one API. `run_id` is the run's own, so that a resumed run goes on under its name.
    A tracker that fails later costs one warning and no more entries. Raises InputError where it is
    not installed or cannot start.
    """
    if name == "none":
        return lambda entry: None
    try:
        tracker = __import__(name)
    except ImportError as error:
        raise InputError(
            f"--tracker {name} needs the package {name}: pip install {name}"
        ) from error
    try:
        run = tracker.init(
            project="storygpt", name=f"{directory.resolve().name}-{run_id}", config=config,
            resume="allow", **({"id": run_id, "dir": str(directory)} if name == "wandb" else {}),
        )  # fmt: skip
    except Exception as error:
        raise InputError(f"--tracker {name} cannot start: {one_line(error)}") from error
    works = True

    def track(entry: dict) -> None:
        nonlocal works
        if not works:
            return
        try:
            run.log(entry, step=entry["step"])
        except Exception as error:  # whatever decorates must never end a run
            works = False
            print(f"--tracker {name} has failed and is off: {one_line(error)}", file=sys.stderr)

    return track


class Log:
    """Shows a run while it trains: bar, plot, samples, tracker.

    What only decorates must never end a run: a failure costs a warning. `flops` are those of a
    token on this device, one of several perhaps.
    """

    def __init__(
        self,
        metrics: list[dict],
        step: int,
        max_steps: int,
        directory: Path,
        track: Callable[[dict], None],
        flops: float,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.metrics, self.plot, self.track = metrics, directory / PLOT, track
        self.device, self.flops = device, flops
        self.peak = peak_flops(device) if dtype != torch.float32 else None
        self.first_step, self.max_steps, self.start = step, max_steps, time.monotonic()
        self.bar = progress_bar(total=max_steps, initial=step, unit="step")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.attempt(self.bar.close)

    def attempt(self, show: Callable, *arguments) -> None:
        try:
            show(*arguments)
        except Exception as error:
            print(f"could not show the run: {one_line(error)}", file=sys.stderr)

    def add(self, entry: dict) -> None:
        """Shows an entry of metrics.jsonl."""
        self.metrics.append(entry)
        self.attempt(self._show, entry)
        self.attempt(self.track, entry)
        if "val_loss" in entry:
            self.attempt(draw_loss_plot, self.metrics, self.plot)

    def _show(self, entry: dict) -> None:
        step = entry["step"]
        if step > 0:
            speed = entry["tokens_per_second"]
            shown = {"loss": f"{entry['train_loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
            shown["epoch"] = f"{entry['epoch']:.2f}"
            if self.peak:
                shown["MFU"] = f"{self.flops * speed / self.peak:.1%}"
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        if step == self.first_step + 20:  # the speed has settled
            recent = self.metrics[-10:]
            seconds = np.mean([e["tokens"] / e["step"] / e["tokens_per_second"] for e in recent])
            left = timedelta(seconds=round(seconds * (self.max_steps - step)))
            self.bar.write(f"about {left} to go at {speed:,.0f} tokens/s{self._in_memory()}")
        if "val_loss" in entry:
            losses = f"val_loss {entry['val_loss']:.4f}"
            if step > 0:
                losses = f"train loss {entry['train_loss']:.4f}, {losses}"
            self.bar.write(f"step {step:,}: {losses}\n    {entry.get('sample', '')}".rstrip())

    def add_sample(self, entry: dict, model: GPT, seed: int) -> None:
        """Adds the first 60 tokens of a story, told from nothing."""
        ((story, _),) = generate_stories(model, "", [seed], GenerationSettings(max_new_tokens=60))
        entry["sample"] = " ".join(story.split())

    def ending(self, status: int, best_val_loss: float, data_dir: Path, tracker: str) -> str:
        """What to say at the end of the run, or where it stops with that exit status."""
        made, speed = [e for e in self.metrics if e["step"] > self.first_step], "no step was left"
        if made:
            tokens = made[-1]["tokens"] * len(made) / made[-1]["step"]
            rate = tokens / (time.monotonic() - self.start)
            speed = f"{rate:,.0f} tokens/s with saves and evaluations{self._in_memory()}"
        if status:
            flags = {"data_dir": data_dir, "checkpoint_dir": self.plot.parent}
            if tracker != "none":
                flags["tracker"] = tracker
            command = command_line("train.py", resume=True, **flags)
            step = self.metrics[-1]["step"] if self.metrics else 0
            return f"stopped after step {step:,} ({speed}); continue with: {command}"
        directory = self.plot.parent
        return (
            f"done: best val_loss {best_val_loss:.4f} in {directory / BEST}, the last step in "
            f"{directory / FINAL}, the curves in {self.plot}; {speed}"
        )

    def _in_memory(self) -> str:
        most = peak_memory(self.device)
        return f", {most / 1e9:.1f} GB of memory at the peak" if most else ""
