"""Script: any runs beside each other, as curves in one picture and as a Markdown table.

Runs that differ in nothing but their seed are one recipe: its mean, and the range of its seeds.
Losses are those that training noted, on eval_windows windows; evaluate.py gives exact ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import tyro

from config import MAY_CHANGE, InputError
from storygpt.checkpoint import build_model, load_checkpoint
from storygpt.files import BEST, FINAL, LATEST, METRICS, save_figure
from storygpt.metrics import parse_metrics
from storygpt.record import fingerprint_of, origin_of
from storygpt.token_files import bits_per_byte, data_fingerprint, load_meta


@dataclass(frozen=True)
class Arguments:
    """Compare the curves of runs, also of such as still train."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The runs' folders, each a --checkpoint_dir of train.py."""
    data_dir: tuple[Path, ...] = ()
    """Folders of the runs' prepared data: losses become bits per byte, the one scale that
    vocabularies share."""
    output: Path = Path("compare.png")
    """The picture to write."""


@dataclass(frozen=True)
class Run:
    """What is read of a run. Arrays have a value for each of its evaluations."""

    name: str
    settings: dict
    parameters: int
    machine: str  # what it runs on now, and in which precision
    data: str | None  # the fingerprint of what it trains on, where the run still tells
    start: str | None  # the sum of the weights that it started from, if any
    step: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray  # of training, without evaluations and saves
    train_loss: np.ndarray  # mean since the evaluation before
    val_loss: np.ndarray


def read_run(folder: Path) -> Run:
    """Raises InputError where there is no run, it has no evaluation yet, or it is damaged."""
    path = folder / METRICS
    if not path.exists():
        raise InputError(
            f"{folder} holds no run (no {METRICS}): pass a --checkpoint_dir of train.py"
        )
    names = [name for name in (LATEST, FINAL, BEST) if (folder / name).exists()]
    if not names:
        raise InputError(f"{folder} has no checkpoint that says what was trained: put {FINAL} back")
    lines = [line for line in parse_metrics(path.read_bytes(), path) if line["step"]]
    evaluated = np.array([i for i, line in enumerate(lines) if "val_loss" in line], dtype=int)
    if not len(evaluated):
        raise InputError(f"the run in {folder} has no evaluation yet: let it reach eval_interval")
    try:
        steps, tokens, losses, speeds = (
            np.array([line[key] for line in lines], dtype=float)
            for key in ("step", "tokens", "train_loss", "tokens_per_second")
        )
        val_loss = np.array([lines[i]["val_loss"] for i in evaluated], dtype=float)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not as train.py writes it: {error!r}") from error
    sums = np.diff(losses.cumsum()[evaluated], prepend=0)
    checkpoint = load_checkpoint(folder / names[0])
    settings = asdict(checkpoint["gpt_config"]) | asdict(checkpoint["training_config"])
    return Run(
        name=str(folder),
        settings={name: value for name, value in settings.items() if name not in MAY_CHANGE},
        parameters=build_model(checkpoint, folder / names[0]).num_parameters(),
        machine=" in ".join(checkpoint[key] for key in ("card", "dtype") if key in checkpoint),
        data=fingerprint_of(checkpoint),
        start=(origin_of(checkpoint) or {}).get("sha256"),
        step=steps[evaluated],
        tokens=tokens[evaluated],
        # steps whose lines are lost count as the next one that is there
        seconds=(np.diff(tokens, prepend=0) / speeds).cumsum()[evaluated],
        train_loss=sums / np.diff(evaluated, prepend=-1),
        val_loss=val_loss,
    )


def bits_of_a_nat(run: Run, data_dirs: tuple[Path, ...]) -> float:
    """Bits per byte that a loss of 1 is on the run's data. Raises InputError where no folder holds
    that."""
    for data_dir in data_dirs:
        try:
            meta = load_meta(data_dir, run.settings["vocab_size"])
        except InputError as error:
            problem = error
            continue
        if run.data in (None, data_fingerprint(meta)):
            return bits_per_byte(1, meta["splits"]["validation"])
        problem = InputError(f"{data_dir} is not what {run.name} was trained on: pass its data too")
    raise problem


def group(runs: list[Run]) -> list[list[Run]]:
    """The runs of each recipe."""
    recipes = {}
    for run in runs:
        same = {"seed": None, "data": run.data, "start": run.start}
        recipe = tuple((run.settings | same).items())
        recipes.setdefault(recipe, []).append(run)
    return list(recipes.values())


def label(recipe: list[Run]) -> str:
    return ", ".join(run.name for run in recipe)


def shortly(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spread(values: list[float], form: str) -> str:
    """The mean, and the range where there is one."""
    low, mean, high = (format(v, form) for v in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(recipes: list[list[Run]], scales: dict[str, float]) -> str:
    """A Markdown row a recipe; settings in which recipes differ have columns."""
    every = [recipe[0].settings for recipe in recipes]
    shown = [
        name
        for name in every[0]
        if name in ("optimizer", "learning_rate")
        or (name != "seed" and len({settings[name] for settings in every}) > 1)
    ]
    columns: dict[str, Callable[[list[Run]], str]] = {
        "run": label,
        **{name: lambda recipe, name=name: shortly(recipe[0].settings[name]) for name in shown},
        "parameters": lambda recipe: f"{recipe[0].parameters:,}",
        "machine": lambda recipe: ", ".join(dict.fromkeys(run.machine for run in recipe)),
    }
    figures: dict[str, tuple[Callable[[Run], float], str]] = {
        "step": (lambda run: run.step[-1], ",.0f"),
        "tokens": (lambda run: run.tokens[-1], ",.0f"),
        "best val_loss": (lambda run: run.val_loss.min(), ".3f"),
        "last val_loss": (lambda run: run.val_loss[-1], ".3f"),
        "seconds of training": (lambda run: run.seconds[-1], ",.0f"),
        "tokens/s": (lambda run: run.tokens[-1] / run.seconds[-1], ",.0f"),
    }
    if scales:
        figures["best bits per byte"] = (lambda run: run.val_loss.min() * scales[run.name], ".4f")
    for name, (value, form) in figures.items():
        columns[name] = lambda recipe, value=value, form=form: spread(
            [value(run) for run in recipe], form
        )
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[column(recipe) for column in columns.values()] for recipe in recipes]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(recipes: list[list[Run]], scales: dict[str, float], path: Path) -> None:
    """Over tokens and over seconds: validation loss, the range of a recipe's seeds around it, and
    training loss, dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for recipe in recipes:
        steps = sorted(set.intersection(*({*run.step} for run in recipe)))

        def curves(name: str, recipe=recipe, steps=steps) -> np.ndarray:
            """(runs, steps)"""
            return np.array([getattr(run, name)[np.isin(run.step, steps)] for run in recipe])

        scale = np.array([[scales.get(run.name, 1.0)] for run in recipe])
        validation, training = curves("val_loss") * scale, curves("train_loss") * scale
        for axes, x_axis in zip(panels, ("tokens", "seconds"), strict=True):
            x = curves(x_axis).mean(0)
            (line,) = axes.plot(x, validation.mean(0), marker=".", label=label(recipe))
            color = line.get_color()
            axes.fill_between(x, validation.min(0), validation.max(0), color=color, alpha=0.25)
            axes.plot(x, training.mean(0), "--", color=color, linewidth=0.8)
    panels[0].set(xlabel="tokens seen", ylabel="bits per byte" if scales else "loss (nats a token)")
    panels[1].set(xlabel="seconds of training")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend(title="validation (dashed: training)")
    save_figure(figure, path, dpi=110)


def main() -> None:
    arguments = cli.parse_flags(Arguments)
    runs = [read_run(folder) for folder in dict.fromkeys(arguments.runs)]
    if not runs:
        raise InputError("there is nothing to compare: pass the --checkpoint_dir of a run or more")
    scales = {}
    if arguments.data_dir:
        scales = {run.name: bits_of_a_nat(run, arguments.data_dir) for run in runs}
    recipes = group(runs)
    draw(recipes, scales, arguments.output)
    print(table(recipes, scales))
    print(f"\nthe curves are in {arguments.output}")


if __name__ == "__main__":
    cli.run(main)
