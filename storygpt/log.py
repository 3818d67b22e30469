"""What a run shows while it trains: bar, plot, samples, and a tracker where one is wanted."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from config import InputError
from model import GPT
from storygpt.cli import one_line, printable, progress_bar
from storygpt.device import peak_flops, peak_memory
from storygpt.files import BEST, FINAL, PLOT
from storygpt.generation import GenerationSettings, generate_stories
from storygpt.metrics import draw_loss_plot

Tracker = Literal["none", "wandb", "trackio"]


def start_tracker(
    name: Tracker, settings: dict, run_id: str, directory: Path
) -> Callable[[dict], None]:
    """Returns a callable that sends an entry of metrics.jsonl to `wandb` or `trackio`, or nowhere.

    `run_id` is the run's own, so that a resumed run goes on under its name.
    A tracker that fails later costs one warning and no more entries. Raises InputError where it is
    not installed or cannot start.
    """
    if name == "none":
        return lambda entry: None
    found = find_spec(name)
    # A folder of that name, as wandb makes one for its runs, is an empty package to Python.
    if found is None or found.origin is None:
        raise InputError(f"--tracker {name} needs the package {name}: pip install {name}")
    try:
        tracker = import_module(name)
    except Exception as error:  # of whatever is in a half installation
        raise InputError(
            f"--tracker {name} needs the package {name}, which cannot be imported here "
            f"({one_line(error)}): pip install --force-reinstall {name}"
        ) from error
    try:
        # Both share one API, but trackio knows a run by its name alone and keeps all elsewhere.
        options = {"id": run_id, "dir": str(directory)} if name == "wandb" else {}
        run_name = f"{directory.resolve().name}-{run_id}"
        run = tracker.init(
            project="storygpt", name=run_name, config=settings, resume="allow", **options
        )
    except Exception as error:
        raise InputError(f"--tracker {name} cannot start: {one_line(error)}") from error
    if name == "wandb":  # its own steps must not go back, as ours do after a crash
        run.define_metric("*", step_metric="step")
    works = True

    def track(entry: dict) -> None:
        nonlocal works
        if not works:
            return
        try:
            if name == "wandb":
                run.log(entry)
            else:  # whose own column is called step
                run.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
        except Exception as error:  # whatever decorates must never end a run
            works = False
            print(f"--tracker {name} has failed and is off: {one_line(error)}", file=sys.stderr)

    return track


@contextmanager
def only_shown() -> Iterator[None]:
    """Has what only decorates a run fail with a warning: it must never end one."""
    try:
        yield
    except Exception as error:
        print(f"could not show the run: {one_line(error)}", file=sys.stderr)


class Log(AbstractContextManager):
    """Shows a run while it trains: bar, plot, samples, tracker."""

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
        """`metrics` are the lines of the run so far, up to `step`; `flops` those of training on a
        token on this device, which may be one of several."""
        self.metrics, self.plot, self.track = metrics, directory / PLOT, track
        self.device, self.flops = device, flops
        self.peak = peak_flops(device) if dtype != torch.float32 else None
        self.first_step, self.start = step, time.monotonic()
        self.bar = progress_bar(total=max_steps, initial=step, unit="step")
        self.drawing = ThreadPoolExecutor(1)  # the GPU does not wait for a plot
        # Whole before that thread draws: a tracker looks into it for what it could send.
        with only_shown():
            import_module("matplotlib.figure")

    def __exit__(self, *_) -> None:
        with only_shown():
            self.bar.close()
        self.drawing.shutdown()

    def add(self, entry: dict) -> None:
        """Shows an entry of metrics.jsonl."""
        self.metrics.append(entry)
        with only_shown():
            self._show(entry)
        with only_shown():
            self.track(entry)
        if "val_loss" in entry:
            self.drawing.submit(only_shown()(draw_loss_plot), [*self.metrics], self.plot)

    def show_left(self, seconds: float) -> None:
        """Says how long the rest of the run will take."""
        with only_shown():
            left, speed = timedelta(seconds=round(seconds)), self.metrics[-1]["tokens_per_second"]
            self.bar.write(f"about {left} to go at {speed:,.0f} tokens/s{self._in_memory()}")

    def add_sample(self, entry: dict, model: GPT, seed: int) -> None:
        """Adds the first 60 tokens of a story, generated from nothing, to an entry."""
        with only_shown():
            settings = GenerationSettings(max_new_tokens=60)
            (story,) = generate_stories(model, "", [seed], settings)
            entry["sample"] = " ".join(story.split())

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
        if "val_loss" in entry:
            losses = f"val_loss {entry['val_loss']:.4f}"
            if step > 0:
                losses = f"train loss {entry['train_loss']:.4f}, {losses}"
            self.bar.write(
                f"step {step:,}: {losses}\n    {printable(entry.get('sample', ''))}".rstrip()
            )

    def speed(self) -> str:
        """Says how fast the steps of this sitting were made."""
        made = [entry for entry in self.metrics if entry["step"] > self.first_step]
        if not made:
            return "no step was left"
        tokens = made[-1]["tokens"] * len(made) / made[-1]["step"]
        speed = tokens / max(time.monotonic() - self.start, 1e-3)
        return f"{speed:,.0f} tokens/s with saves and evaluations{self._in_memory()}"

    def _in_memory(self) -> str:
        most = peak_memory(self.device)
        return f", {most / 1e9:.1f} GB of memory at the peak" if most else ""


def words_when_done(directory: Path, best_val_loss: float, speed: str) -> str:
    """Says what a run that has made its last step leaves."""
    return (
        f"done: best val_loss {best_val_loss:.4f} in {directory / BEST}, the last step in "
        f"{directory / FINAL}, the curves in {directory / PLOT}; {speed}"
    )
