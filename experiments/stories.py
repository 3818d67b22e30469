"""Script: how stories change over training, or with the sampler, from files that
`evaluate.py --num_stories N --output FILE.json` wrote: a table and a plot of their rows."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import InputError
from storygpt.cli import parse_flags, run
from storygpt.files import save_figure
from storygpt.judging.measures import ROWS, story_table


@dataclass(frozen=True)
class Arguments:
    """Print the rows of several evaluations side by side, and draw them."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """What evaluate.py wrote, in the order of the table."""
    over: Literal["step", "temperature", "top_k", "top_p"] = "step"
    """What the evaluations differ in: the title of their columns, and the plot's axis."""
    column: str = "told from nothing"
    """Which stories of each evaluation."""
    output: Path = Path("stories.png")
    """Where to draw them."""


def read(files: tuple[Path, ...], column: str) -> list[dict]:
    """The evaluations in `files`. Raises InputError where one is none, or told no stories."""
    reports = []
    for path in files:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            report["columns"][column], report["columns"]["held-out"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} has no stories {column!r}: it is written by evaluate.py with "
                "--num_stories and --output"
            ) from error
        reports.append(report)
    if not reports:
        raise InputError("there is nothing to draw: name files that evaluate.py wrote")
    return reports


def draw(reports: list[dict], over: str, column: str, path: Path) -> None:
    """A panel a row: the numbers of the told and of the held-out stories over `over`."""
    from matplotlib.figure import Figure

    reports = sorted(reports, key=lambda report: report[over])  # a line goes on to the right
    names = [name for name in ROWS if reports[-1]["columns"]["held-out"].get(name)]
    figure = Figure(figsize=(12, 2.4 * math.ceil(len(names) / 3)), layout="constrained")
    panels = list(figure.subplots(math.ceil(len(names) / 3), 3, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        scale = 100 if ROWS[name].unit == "%" else 1
        for title, color in (("held-out", "black"), (column, "tab:blue")):
            points = [(report[over], report["columns"][title][name]) for report in reports]
            x = [x for x, numbers in points if numbers]
            value, low, high = ([scale * y[i] for _, y in points if y] for i in range(3))
            axes.plot(x, value, ".-", color=color, label=title)
            axes.fill_between(x, low, high, color=color, alpha=0.2)
        if over in ("step", "top_k"):
            axes.set_xscale("log")
            axes.minorticks_off()
        values = [report[over] for report in reports]
        axes.set_xticks(values, [f"{x:,}" for x in values])
        axes.set_title(f"{ROWS[name].label}, {ROWS[name].unit}", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].legend(fontsize=8)
    figure.supxlabel(over)
    save_figure(figure, path, dpi=100)


def main() -> None:
    arguments = parse_flags(Arguments)
    over, column = arguments.over, arguments.column
    reports = read(arguments.files, column)
    values = [report[over] for report in reports]
    if None in values or len({*values}) < len(values):
        raise InputError(f"every evaluation needs a {over} of its own, and these have {values}")
    columns = {f"{over} {report[over]:,}": report["columns"][column] for report in reports}
    print(story_table(columns | {"held-out": reports[-1]["columns"]["held-out"]}))
    draw(reports, over=over, column=column, path=arguments.output)


if __name__ == "__main__":
    run(main)
