"""What a run leaves to read: metrics.jsonl, and the plot of it."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np

from config import InputError
from storygpt.cli import warn
from storygpt.files import save_figure, write_bytes


def parse_metrics(text: bytes, path: Path) -> list[dict]:
    """Returns the lines of a metrics.jsonl read from `path`, in which steps may lack.

    A power cut can leave half of the last line, which does not count. Raises InputError where
    another line is not one that training wrote, or steps go back.
    """
    lines, metrics = text.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            learned = entry["step"] == 0 or math.isfinite(entry["train_loss"])
            if not (learned and entry["step"] >= 0 and entry["tokens"] >= 0):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break
            raise InputError(
                f"line {number} of {path} is not one that training wrote: mend or remove it, or "
                "move the file away to go on without it"
            ) from error
        if metrics and entry["step"] <= metrics[-1]["step"]:
            raise InputError(
                f"line {number} of {path} has step {entry['step']:,} after step "
                f"{metrics[-1]['step']:,}: leave each step once, in order, or move the file away "
                "to go on without it"
            )
        metrics.append(entry)
    return metrics


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """Returns the lines of metrics.jsonl up to `last_step`, to which it is cut; says what lacks.

    Raises InputError, the file untouched, as `parse_metrics` does.
    """
    text = path.read_bytes() if path.exists() else b""
    metrics = [entry for entry in parse_metrics(text, path) if entry["step"] <= last_step]
    steps = [0, *(entry["step"] for entry in metrics), last_step + 1]
    gaps = [f"{a + 1:,} to {b - 1:,}" for a, b in pairwise(steps) if b > a + 1]
    if gaps:
        warn(f"{path} has no steps {', '.join(gaps)}: the curves go without them")
    kept = "".join(json.dumps(entry) + "\n" for entry in metrics).encode()
    if kept != text:
        write_bytes(path, kept)
    return metrics


def append_metrics(path: Path, entries: list[dict], size: int) -> int:
    """Adds lines of strict JSON to a file of `size` bytes; returns its new size.

    What is behind `size` is half of what an earlier attempt came to write, and is cut off.
    """
    lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
    with open(path, "ab") as file:
        if file.tell() > size:
            file.truncate(size)
        file.write(lines.encode())
        file.flush()
        return file.tell()


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns a running mean that does not lag: over as many values before as after, a fiftieth of
    all at the most and fewer at the start. From the last whole fiftieth on it is that one's line of
    least squares, which goes through its mean."""
    reach = len(values) // 100
    if not reach:
        return values
    index = np.arange(len(values) - reach)
    reaches = np.minimum(index // 4, reach)
    sums = np.concatenate(([0.0], values.cumsum()))
    means = (sums[index + reaches + 1] - sums[index - reaches]) / (2 * reaches + 1)
    x = np.arange(-reach, reach + 1)
    slope = x @ values[-len(x) :] / (x @ x)
    return np.concatenate((means, means[-1] + slope * x[reach + 1 :]))


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
