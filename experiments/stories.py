"""Script: how stories change over training, or with the sampler, from files that
`evaluate.py --num_stories N --output FILE.json` wrote: a table and a plot of their rows."""

import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import InputError
from storygpt.checkpoint import write_atomically
from storygpt.cli import parse_flags, run
from storygpt.measures import ROWS, story_table


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
    """A panel a row: the told stories' numbers over `over`, the held-out ones' as a band."""
    from matplotlib.figure import Figure

    held_out = reports[-1]["columns"]["held-out"]
    names = [name for name in ROWS if held_out.get(name)]
    figure = Figure(figsize=(12, 2.4 * math.ceil(len(names) / 3)), layout="constrained")
    panels = list(figure.subplots(math.ceil(len(names) / 3), 3, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        scale = 100 if ROWS[name].unit == "%" else 1
        points = [(r[over], r["columns"][column][name]) for r in reports]
        points = [(x, [scale * y for y in numbers]) for x, numbers in points if numbers]
        x, numbers = [x for x, _ in points], [y for _, y in points]
        value, low, high = ([y[i] for y in numbers] for i in range(3))
        axes.plot(x, value, ".-", color="tab:blue", label=column)
        axes.fill_between(x, low, high, color="tab:blue", alpha=0.2)
        real, least, most = (scale * y for y in held_out[name])
        axes.axhline(real, color="black", linewidth=1, label="held-out")
        axes.axhspan(least, most, color="black", alpha=0.15)
        if over in ("step", "top_k"):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{ROWS[name].label}, {ROWS[name].unit}", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].legend(fontsize=8)
    figure.supxlabel(over)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100, metadata={"Software": None})
    write_atomically(path, lambda file: file.write(image.getvalue()))


def main() -> None:
    arguments = parse_flags(Arguments)
    over, column = arguments.over, arguments.column
    reports = read(arguments.files, column)
    if any(report[over] is None for report in reports):
        raise InputError(f"an evaluation has no {over}: leave it out")
    columns = {f"{over} {report[over]:,}": report["columns"][column] for report in reports}
    print(story_table(columns | {"held-out": reports[-1]["columns"]["held-out"]}))
    draw(reports, over, column, arguments.output)


if __name__ == "__main__":
    run(main)
