"""Script: the curves and tables of RESULTS.md, from the small files in results/.

`--collect` reads finished runs into results/NAME.json, one file a run, NAME ending in the seed:
`results/muon-1.json`. Every run of a NAME but for its seed is the same recipe.
"""

import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import InputError
from evaluate import exact_loss
from storygpt.checkpoint import FINAL, load_model
from storygpt.cli import parse_flags, run
from storygpt.token_files import bits_per_byte, load_meta, load_tokens

RECIPES = ("adamw", "muon", "muon-60%")
LONG = tuple(f"long-{name}" for name in RECIPES)
EPOCHS = ("epochs-adamw", "epochs-muon")
VOCABULARIES = ("vocab-50257", "vocab-16384", "vocab-8192", "vocab-4096")


@dataclass(frozen=True)
class Arguments:
    """Draw results/*.png and print the tables, after reading finished runs where there are any."""

    collect: tuple[Path, ...] = ()
    """Folders of finished runs (their --checkpoint_dir), each named after its recipe and seed."""
    data_dir: Path = Path("data")
    """Folder with the prepared data of those runs."""
    results_dir: Path = Path("experiments/results")
    """Folder of the figures and plots."""


def collect(folder: Path, data_dir: Path) -> dict:
    """What is kept of a run: its settings, its validation curve, and its exact bits per byte."""
    model, checkpoint = load_model(folder / FINAL)
    meta = load_meta(data_dir, model.config.vocab_size)
    counts = meta["splits"]["validation"]
    tokens = load_tokens(data_dir, "validation", meta, model.config.context_length)
    loss = exact_loss(model, tokens, meta["end_of_text"], batch_size=16)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens_seen = np.array([line["tokens"] for line in lines])
    speeds = np.array([line["tokens_per_second"] for line in lines])
    seconds = (np.diff(tokens_seen, prepend=0) / speeds).cumsum()  # of training, not evaluating
    evaluated = [i for i, line in enumerate(lines) if "val_loss" in line]
    train_loss = np.array([line["train_loss"] for line in lines])
    since = zip([0, *(i + 1 for i in evaluated)], evaluated, strict=False)
    return {
        "settings": asdict(checkpoint["gpt_config"]) | asdict(checkpoint["training_config"]),
        "step": [lines[i]["step"] for i in evaluated],
        "tokens": [lines[i]["tokens"] for i in evaluated],
        "seconds": [round(seconds[i].item(), 1) for i in evaluated],
        "val_loss": [round(lines[i]["val_loss"], 4) for i in evaluated],
        "train_loss": [round(train_loss[i : j + 1].mean().item(), 4) for i, j in since],
        "final_val_loss": round(loss, 4),
        "bits_per_byte": round(bits_per_byte(loss, counts), 4),
    }


def draw(
    recipes: dict[str, list[dict]], names, x_axes: dict[str, str], y_axis, path: Path, train=False
) -> None:
    """The mean curve of each recipe over its seeds, and the range between them.

    With `train`, also the training loss, dashed: the mean since the evaluation before.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(x_axes), 4), layout="constrained")
    panels = figure.subplots(1, len(x_axes), squeeze=False)[0]
    for axes, (key, label) in zip(panels, x_axes.items(), strict=True):
        for name in names:
            runs = recipes.get(name)
            if not runs:
                continue
            x = np.mean([r[key] for r in runs], axis=0)
            y = np.array([y_axis(r) for r in runs])
            seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
            (line,) = axes.plot(x, y.mean(0), marker=".", label=f"{name} ({seeds})")
            axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.25)
            if train:
                losses = np.mean([r["train_loss"] for r in runs], axis=0)
                axes.plot(x, losses, "--", color=line.get_color(), label=f"{name}, training")
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    panels[0].set_ylabel(y_axis.__doc__)
    figure.savefig(path, dpi=110)


def validation_loss(run: dict) -> list[float]:
    """validation loss (nats a token)"""
    return run["val_loss"]


def bits_per_byte_curve(run: dict) -> list[float]:
    """validation bits per byte"""
    scale = run["bits_per_byte"] / run["final_val_loss"]
    return [scale * loss for loss in run["val_loss"]]


def main() -> None:
    arguments = parse_flags(Arguments)
    results_dir = arguments.results_dir
    results_dir.mkdir(parents=True, exist_ok=True)
    for folder in arguments.collect:
        if not (folder / FINAL).exists():
            raise InputError(f"{folder} holds no finished run (no {FINAL}): train it first")
        kept = collect(folder, arguments.data_dir)
        (results_dir / f"{folder.name}.json").write_text(json.dumps(kept) + "\n")
    recipes = defaultdict(list)
    for path in sorted(results_dir.glob("*.json")):
        recipes[path.stem.rpartition("-")[0]].append(json.loads(path.read_text()))
    if not recipes:
        raise InputError(f"{results_dir} holds no results: pass --collect with finished runs")

    print("| recipe | steps | final validation loss | bits per byte | seconds |")
    print("|---|---|---|---|---|")
    for name, runs in recipes.items():
        losses = [r["final_val_loss"] for r in runs]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(runs) > 1 else ""
        bits, seconds = (
            np.mean([value(r) for r in runs])
            for value in (lambda r: r["bits_per_byte"], lambda r: r["seconds"][-1])
        )
        print(
            f"| {name} | {runs[0]['step'][-1]:,} | {np.mean(losses):.3f}{spread} | {bits:.4f} "
            f"| {seconds:.0f} |"
        )
    over_time = {"tokens": "tokens seen", "seconds": "seconds of training"}
    draw(recipes, RECIPES, over_time, validation_loss, results_dir / "recipes.png")
    draw(recipes, LONG, over_time, validation_loss, results_dir / "long.png")
    epochs = {"tokens": "tokens seen"}
    draw(recipes, EPOCHS, epochs, validation_loss, results_dir / "epochs.png", train=True)
    draw(
        recipes,
        VOCABULARIES,
        {"seconds": "seconds of training"},
        bits_per_byte_curve,
        results_dir / "vocabulary.png",
    )


if __name__ == "__main__":
    run(main)
